"""`saelab serve RUN`: a server of OpenAI's protocol for the language model of a RUN, steered by what a request asks for."""
