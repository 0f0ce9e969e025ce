"""Texts to token ids: where documents come from, which are held out, how they are tokenised, packed and masked."""

from saelab.tokens.documents import check_split, document_id, is_held_out
from saelab.tokens.texts import Texts, TokenBatch, load_texts, pack

__all__ = ["Texts", "TokenBatch", "check_split", "document_id", "is_held_out", "load_texts", "pack"]
