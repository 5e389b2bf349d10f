"""From prompts to responses: the client of SGLang's HTTP API."""
