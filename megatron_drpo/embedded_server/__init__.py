"""The embedded server: a subset of SGLang's native HTTP API on top of `transformers`.

For machines without SGLang: `python -m megatron_drpo.embedded_server --model-path FOLDER --port 30000`.
From the outside in: `server.py` puts the parts together, `app.py` is HTTP, `protocol.py` what requests and
responses look like, `generator.py` the decode loop, `runner.py` the model and its key/value cache,
`routing.py` the experts that tokens went to, `sampling.py` next tokens, `weights.py` updates.
"""
