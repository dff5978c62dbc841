"""An OpenAI-compatible HTTP API over `AsyncLLM`, as an ASGI app.

from qwen_runtime.server import create_app

app = create_app("artifacts/tiny-qwen2-chat")        # uvicorn module:app
parent.mount("/llm", create_app(llm))                # or inside another app
"""

from qwen_runtime.server.app import create_app
from qwen_runtime.server.settings import ServerSettings

__all__ = ["ServerSettings", "create_app"]
