"""OpenAI-compatible HTTP over the engine: FastAPI on the event loop, the engine in a thread of its own.

Knows nothing of models, trees or caches. Needs the extra `serve`; nothing here is imported by the library.
"""
