"""From prompts to responses: the client of SGLang's HTTP API, and a small server that speaks it."""
