"""EndpointAnswerer: the target behind any OpenAI-compatible endpoint, many requests at once.

The scale-out path: a cluster of vLLM or SGLang writes the answers, the trainer reads them. Knows HTTP and
retries; nothing of conversations. httpx is imported when the first prompt is sent.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from specdec.errors import SpecdecError, UnsupportedError
from training.responses import Answer

if TYPE_CHECKING:
    import httpx

    Asked = asyncio.Task[Answer | SpecdecError | None]

RETRY = frozenset({408, 409, 425, 429})  # and everything from 500 on
LONGEST_WAIT = 60.0  # seconds, whatever Retry-After says
# fields of vLLM and SGLang that OpenAI's API has not: answers as ids, and nothing of what the model's
# generation_config.json asks for, from which these servers take what a request leaves open
BEYOND: dict[str, Any] = {"return_token_ids": True, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
KEYS = ("SPECDEC_API_KEY", "OPENAI_API_KEY")  # environment variables; the first that is set counts


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the target is served and how hard to try.

    Attributes:
        url: of the server or of its `/v1`.
        model: name it is served under.
        api_key: sent as a bearer token.
        concurrent: requests in flight at most.
        timeout: seconds for one answer.
        retries: attempts after the first, on timeouts, lost connections, 429 and 5xx.
        backoff: seconds before the first retry; doubles each time, with jitter.
    """

    url: str
    model: str
    api_key: str | None = None
    concurrent: int = 64
    timeout: float = 600.0
    retries: int = 6
    backoff: float = 0.5

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise SpecdecError(
                "is no address", field="endpoint", value=self.url, allowed="http://... or https://..."
            )
        for name, value, low in (("concurrent", self.concurrent, 1), ("retries", self.retries, 0)):
            if value < low:
                raise SpecdecError("is too small", field=f"endpoint {name}", value=value, allowed=f">= {low}")

    @property
    def completions(self) -> str:
        """Address of the completions call."""
        base = self.url.rstrip("/")
        return f"{base}/completions" if base.endswith("/v1") else f"{base}/v1/completions"


class EndpointAnswerer:
    """Sends token ids, so the endpoint's chat template plays no part.

    Args:
        endpoint: where and how.
        encode: text to ids, for endpoints that do not return token ids; the ids of an answer are then
            what its text tokenises to, nearly always what was written.
        stop_id: appended to such an answer when it ended by itself; None for a target that has none.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        encode: Callable[[str], list[int]],
        stop_id: int | None,
    ) -> None:
        self.endpoint, self.encode, self.stop_id = endpoint, encode, stop_id
        self._beyond = BEYOND  # less those that the endpoint objects to
        self._stopped = False
        self._jitter = random.Random()

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        temperatures: Sequence[float],
        seeds: Sequence[int],
        max_tokens: int,
    ) -> Iterator[Answer]:
        """Answers in the order they arrive.

        After a final failure no new request starts; those in flight are still yielded and then the failure is
        raised, so nothing that was paid for is lost.

        Raises:
            SpecdecError: the endpoint refuses, or fails more often than `retries`.
            UnsupportedError: httpx is not installed.
        """
        bodies = [
            {"model": self.endpoint.model, "prompt": list(prompt), "max_tokens": max_tokens,
             "temperature": temperature, "top_p": 1.0, "seed": seed, "stream": False}
            for prompt, temperature, seed in zip(prompts, temperatures, seeds, strict=True)
        ]  # fmt: skip
        self._stopped = False
        failure: SpecdecError | None = None
        # A private loop that runs between yields: no thread, and an abandoned generator cancels its requests.
        with asyncio.Runner() as runner:
            client, waiting = runner.run(self._begin(bodies))
            try:
                while waiting:
                    done, waiting = runner.run(_first(waiting))
                    for task in done:
                        if isinstance(result := task.result(), Answer):
                            yield result
                        elif result is not None:
                            failure = failure or result
            finally:
                runner.run(_end(client, waiting))
        if failure is not None:
            raise failure

    async def _begin(self, bodies: list[dict[str, Any]]) -> tuple[httpx.AsyncClient, set[Asked]]:
        client = self._client()
        gate = asyncio.Semaphore(self.endpoint.concurrent)
        return client, {
            asyncio.create_task(self._one(client, gate, i, body)) for i, body in enumerate(bodies)
        }

    def _client(self) -> httpx.AsyncClient:
        try:
            import httpx
        except ImportError as error:
            raise UnsupportedError("needs the package httpx", field="endpoint",
                                   remedy="pip install httpx.") from error  # fmt: skip
        key = self.endpoint.api_key
        return httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=self.endpoint.timeout,
            limits=httpx.Limits(max_connections=self.endpoint.concurrent),
        )

    async def _one(
        self, client: httpx.AsyncClient, gate: asyncio.Semaphore, index: int, body: dict[str, Any]
    ) -> Answer | SpecdecError | None:
        """One prompt: its answer, why there is none, or None when another's failure came first."""
        async with gate:
            if self._stopped:
                return None
            try:
                return self._read(index, await self._post(client, body))
            except SpecdecError as error:
                self._stopped = True
                return error

    async def _post(self, client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
        """The reply's first choice. Raises SpecdecError when trying again is hopeless or has been tried."""
        import httpx

        why = ""
        for attempt in range(self.endpoint.retries + 1):
            wait = self.endpoint.backoff * 2**attempt * self._jitter.uniform(0.5, 1.5)
            beyond = self._beyond
            try:
                reply = await client.post(self.endpoint.completions, json=body | beyond)
                if reply.is_success:
                    choice: dict[str, Any] = reply.json()["choices"][0]
                    return choice
                why = f"status {reply.status_code}: {reply.text[:200]}"
                if unknown := _refused_fields(reply, beyond):
                    self._beyond = {k: v for k, v in self._beyond.items() if k not in unknown}
                    wait = 0.0
                elif reply.status_code not in RETRY and reply.status_code < 500:
                    raise self._refused(reply.status_code, why)
                wait = max(wait, _retry_after(reply.headers.get("retry-after")))
            except (httpx.TransportError, ValueError, LookupError, TypeError) as error:
                why = f"{type(error).__name__}: {error}"
            if attempt < self.endpoint.retries:
                await asyncio.sleep(min(wait, LONGEST_WAIT))
        raise SpecdecError(f"failed {self.endpoint.retries + 1} times, last with {why}", field="endpoint",
                           value=self.endpoint.completions,
                           remedy="See that it is up, then run again: answers so far are kept.")  # fmt: skip

    def _refused(self, status: int, why: str) -> SpecdecError:
        remedy = {
            401: f"Set {KEYS[0]} (or {KEYS[1]}) to the right API key.",
            403: f"Set {KEYS[0]} (or {KEYS[1]}) to an API key that may use this model.",
            404: f"Check the address and that it serves {self.endpoint.model!r}.",
        }.get(status, "The endpoint must take token ids as the prompt of /v1/completions.")
        return SpecdecError(
            f"refuses with {why}", field="endpoint", value=self.endpoint.completions, remedy=remedy
        )

    def _read(self, index: int, choice: dict[str, Any]) -> Answer:
        reason = str(choice.get("finish_reason") or "stop")
        ids = choice.get("token_ids")
        if isinstance(ids, list):
            return Answer(index, ids, reason)
        text = self.encode(str(choice.get("text", "")))
        end = [self.stop_id] if reason == "stop" and self.stop_id is not None else []
        return Answer(index, [*text, *end], reason)


def api_key() -> str | None:
    """The key in the environment: never on the command line, where other users of the machine can read it."""
    return next((key for name in KEYS if (key := os.environ.get(name, "").strip())), None)


async def _first(waiting: set[Asked]) -> tuple[set[Asked], set[Asked]]:
    return await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)


async def _end(client: httpx.AsyncClient, waiting: set[Asked]) -> None:
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await client.aclose()


def _refused_fields(reply: httpx.Response, sent: Mapping[str, Any]) -> set[str]:
    """Those of the fields sent that a request was refused for."""
    return {name for name in sent if name in reply.text} if reply.status_code in (400, 422) else set()


def _retry_after(header: str | None) -> float:
    """Seconds; a date or nonsense counts as none."""
    try:
        return max(0.0, float(header or 0))
    except ValueError:
        return 0.0
