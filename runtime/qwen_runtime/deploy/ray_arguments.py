"""The arguments of ``serve run qwen_runtime.deploy.ray_serve:app_builder``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from qwen_runtime.server import ServerSettings
from qwen_runtime.server.settings import read_api_keys

__all__ = ["LLM_ARGUMENTS", "AppArguments"]

_OF_THE_SERVER = frozenset(
    (
        *("protect_metrics", "page", "cors_origins", "max_body_bytes"),
        *("served_model_name", "drain_seconds", "log_format"),
    )
)
LLM_ARGUMENTS: Final = frozenset(
    (
        *("device", "backend", "threads", "prefix_cache_slots", "prefill_chunk_size"),
        *("max_num_seqs", "max_queued_requests", "max_cache_tokens"),
    )
)
"""Arguments of `LLM` that a replica takes."""
_YES_OR_NO = frozenset(("protect_metrics", "page"))


class AppArguments(BaseModel):
    """What `app_builder` takes, as texts of a command line or values of a config file.

    None leaves a default to where it belongs: `ServerSettings`, `LLM` or `Autoscaling`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    bundle: str
    """The bundle's folder; the same path on every machine."""
    num_replicas: int = 1
    """Replicas to run; the least number with max_replicas."""
    max_replicas: int | None = None
    """Most replicas; turns autoscaling on."""
    target_ongoing_requests: float | None = None
    """Requests that each replica should have; see `Autoscaling`."""
    api_key_file: str | None = None
    """File of keys on the machine that builds the application; see `read_api_keys`."""
    protect_metrics: bool | None = None
    page: bool | None = None
    cors_origins: tuple[str, ...] | None = None
    """A list, or one text with commas."""
    max_body_bytes: int | None = None
    served_model_name: str | None = None
    drain_seconds: float | None = None
    log_format: Literal["text", "json"] | None = None
    device: Literal["cpu", "cuda"] | None = None
    backend: Literal["onnxruntime", "tensorrt"] | None = None
    threads: int | None = None
    prefix_cache_slots: int | None = None
    max_num_seqs: int | None = None
    max_queued_requests: int | None = None
    max_cache_tokens: int | None = None
    prefill_chunk_size: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_known(cls, values: Any) -> Any:
        for name in values if isinstance(values, dict) else ():
            if name not in cls.model_fields:
                raise ValueError(
                    f"{name} is no argument of this application; they are "
                    f"{', '.join(sorted(cls.model_fields))}"
                )
        return values

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_a_number(cls, value: Any, info: Any) -> Any:
        if isinstance(value, bool) and info.field_name not in _YES_OR_NO:
            raise ValueError(f"{info.field_name} must not be {value!r}")
        return value

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _split_at_commas(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value

    def settings(self) -> ServerSettings:
        """Those of the server.

        Raises:
            RequestError: If a value is wrong, or the file of keys cannot be read.
        """
        keys = () if self.api_key_file is None else read_api_keys(Path(self.api_key_file))
        return ServerSettings(api_keys=keys, **self._given(_OF_THE_SERVER))

    def llm_arguments(self) -> dict[str, Any]:
        """Those of the model that were given."""
        return self._given(LLM_ARGUMENTS)

    def _given(self, names: frozenset[str]) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in sorted(names)}
        return {name: value for name, value in values.items() if value is not None}
