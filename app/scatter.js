// The map of the Map page: points on a canvas, with a tooltip, a lasso, and a click that opens a feature.
//
// data: Uint8Array of a little-endian uint32 (length of the header), the header (JSON: labels, ids, lasso, legend, alt, address), and for
// each point float32 x, y and uint8 shade (0 to 254 by colour; 255: one of the list, drawn as a larger square).

const RAMP = [[0, 34, 78], [65, 77, 107], [124, 123, 120], [188, 175, 111], [254, 232, 56]]; // cividis
const LISTED = ink([213, 94, 0]), FEW = 2000, NEAR = 9, MAX_CORNERS = 60;

export default function ({ data, parentElement, setTriggerValue }) {
  const root = parentElement.querySelector(".map");
  const [points, lines] = root.querySelectorAll("canvas");
  const tip = root.querySelector(".tip"), legend = root.querySelector(".legend");
  const { head, xy, shade } = unpack(data);
  const n = shade.length, ratio = window.devicePixelRatio || 1;
  let size = [0, 0], view = { x: 0, y: 0, zoom: 1 }, path = null, pan = null, over = -1;

  const scale = () => 0.47 * Math.min(...size) * view.zoom;
  const toScreen = (x, y) => [size[0] / 2 + (x - view.x) * scale(), size[1] / 2 - (y - view.y) * scale()];
  const toMap = (px, py) => [view.x + (px - size[0] / 2) / scale(), view.y - (py - size[1] / 2) / scale()];
  const colours = Array.from({ length: 255 }, (_, i) => colour(i / 254, isDark(root))), inks = colours.map(ink);
  const order = Uint32Array.from({ length: n }, (_, i) => i).sort((a, b) => shade[a] - shade[b]);

  function resize() {
    size = [root.clientWidth, root.clientHeight - legend.offsetHeight];
    for (const canvas of [points, lines]) {
      canvas.width = size[0] * ratio;
      canvas.height = size[1] * ratio;
      canvas.style.height = `${size[1]}px`;
    }
    draw();
  }

  function draw() {
    // Pixel by pixel: five times as fast for 100,000 points as filling rectangles.
    const { width, height } = points, context = points.getContext("2d");
    if (!width || !height) return;
    const image = context.createImageData(width, height), pixels = new Uint32Array(image.data.buffer);
    const small = Math.round(ratio * Math.max(n > FEW ? 2 : 5, Math.min(6, view.zoom * 1.5))), large = small + 4;
    const by = scale() * ratio, [left, top] = toScreen(0, 0).map((value) => value * ratio);
    for (const i of order) {
      const side = shade[i] === 255 ? large : small, ink = shade[i] === 255 ? LISTED : inks[shade[i]];
      const x = Math.round(left + xy[2 * i] * by - side / 2), y = Math.round(top - xy[2 * i + 1] * by - side / 2);
      if (x < 0 || y < 0 || x + side > width || y + side > height) continue;
      for (let row = y; row < y + side; row++) pixels.fill(ink, row * width + x, row * width + x + side);
    }
    context.putImageData(image, 0, 0);
    drawLines();
  }

  function drawLines() {
    const context = lines.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, ...size);
    context.strokeStyle = getComputedStyle(root).color;
    context.lineWidth = 1.5;
    const shown = path || head.lasso.map(([x, y]) => toScreen(x, y));
    if (shown.length > 1) {
      context.setLineDash([5, 3]);
      context.beginPath();
      shown.forEach(([px, py], i) => (i ? context.lineTo(px, py) : context.moveTo(px, py)));
      if (!path) context.closePath();
      context.stroke();
      context.setLineDash([]);
    }
    if (over >= 0) {
      const [px, py] = toScreen(xy[2 * over], xy[2 * over + 1]);
      context.strokeRect(px - 6, py - 6, 12, 12);
    }
  }

  function nearest(px, py) {
    const [mx, my] = toMap(px, py);
    let best = -1, least = (NEAR / scale()) ** 2;
    for (let i = 0; i < n; i++) {
      const dx = xy[2 * i] - mx, dy = xy[2 * i + 1] - my, far = dx * dx + dy * dy;
      if (far < least) [best, least] = [i, far];
    }
    return best;
  }

  function say(px, py) {
    tip.hidden = over < 0;
    if (over < 0) return;
    tip.textContent = `${head.ids[over]}: ${head.labels[over] || "\u2013"}`;
    tip.style.left = `${Math.min(px + 12, Math.max(0, size[0] - tip.offsetWidth))}px`;
    tip.style.top = `${py + 14 + tip.offsetHeight > size[1] ? py - tip.offsetHeight - 6 : py + 14}px`;
  }

  const place = (event) => {
    const box = lines.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  const zoom = (factor) => ((view.zoom = Math.min(60, Math.max(1, view.zoom * factor))), draw());

  lines.onpointerdown = (event) => {
    lines.setPointerCapture(event.pointerId);
    if (event.shiftKey) pan = place(event);
    else path = [place(event)];
  };
  lines.onpointermove = (event) => {
    const here = place(event);
    if (pan) {
      [view.x, view.y] = [view.x - (here[0] - pan[0]) / scale(), view.y + (here[1] - pan[1]) / scale()];
      pan = here;
      draw();
    } else if (path) {
      path.push(here);
      drawLines();
    } else {
      over = nearest(...here);
      say(...here);
      drawLines();
    }
  };
  lines.onpointerup = () => {
    const drawn = path || [];
    path = pan = null;
    if (span(drawn) > 8) {
      const step = Math.ceil(drawn.length / MAX_CORNERS);
      const corners = drawn.filter((_, i) => i % step === 0).map(([px, py]) => toMap(px, py));
      if (corners.length > 2) setTriggerValue("lasso", corners.map(([x, y]) => [round(x), round(y)]));
    } else if (drawn.length) {
      const found = nearest(...drawn[0]);
      if (found >= 0) window.location.assign(head.address + head.ids[found]);
    }
    drawLines();
  };
  lines.onpointerleave = () => ((over = -1), (tip.hidden = true), drawLines());
  lines.onwheel = (event) => event.ctrlKey && (event.preventDefault(), zoom(event.deltaY < 0 ? 1.2 : 1 / 1.2));
  const [more, less, all] = root.querySelectorAll("button");
  more.onclick = () => zoom(1.5);
  less.onclick = () => zoom(1 / 1.5);
  all.onclick = () => ((view = { x: 0, y: 0, zoom: 1 }), draw());

  lines.setAttribute("aria-label", head.alt);
  legend.querySelector(".low").textContent = head.legend[0];
  legend.querySelector(".high").textContent = head.legend[1];
  legend.querySelector(".ramp").style.background = `linear-gradient(to right, ${colours.filter((_, i) => i % 32 === 0).map((part) => `rgb(${part.join()})`)})`;
  const watcher = new ResizeObserver(resize);
  watcher.observe(root);
  return () => watcher.disconnect();
}

const round = (value) => Math.round(value * 1000) / 1000;

function span(path) {
  const [xs, ys] = [path.map((p) => p[0]), path.map((p) => p[1])];
  return path.length ? Math.max(Math.max(...xs) - Math.min(...xs), Math.max(...ys) - Math.min(...ys)) : 0;
}

function unpack(data) {
  const bytes = data.buffer.slice(data.byteOffset, data.byteOffset + data.byteLength);
  const length = new DataView(bytes).getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(new Uint8Array(bytes, 4, length)));
  const start = 4 + length, n = head.ids.length;
  const xy = new Float32Array(bytes.slice(start, start + 8 * n));
  return { head, xy, shade: new Uint8Array(bytes, start + 8 * n, n) };
}

function isDark(element) {
  const [r, g, b] = getComputedStyle(element).color.match(/[\d.]+/g).map(Number);
  return r + g + b > 384; // light text
}

function colour(share, dark) {
  // The dark end of the ramp is hardly seen on a dark page, the light end on a light one: use three quarters.
  const at = 4 * (dark ? 0.25 + 0.75 * share : 0.75 * share), i = Math.min(3, Math.floor(at));
  const part = RAMP[i].map((value, c) => Math.round(value + (at - i) * (RAMP[i + 1][c] - value)));
  return part;
}

function ink([r, g, b]) {
  return (255 << 24) | (b << 16) | (g << 8) | r; // a pixel's bytes in the order of little-endian machines
}
