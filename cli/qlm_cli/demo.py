"""`qlm demo`: the main job from end to end, on real parts, on this machine."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

import qlm_batch
from qlm_batch.domain.errors import ConfigurationError
from qlm_batch.embedded.service import EmbeddedService
from qlm_cli.batches import ENDED
from qlm_cli.client import Client
from qlm_cli.context import json_option
from qlm_cli.demo_report import DemoBatch, Report, score
from qlm_cli.output import Json, Output, eta_text
from qlm_cli.receivers import Receivers
from qlm_cli.up import settings_for_up, stop_event, wait_until_ready

_CALLBACK_WAIT_S = 60.0


@click.command()
@click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("var/demo"),
    show_default=True,
    help="Folder the demo keeps its data and results in.",
)
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    default=8650,
    show_default=True,
    help="The API's port.",
)
@click.option(
    "--engine",
    type=click.Choice(["vllm", "simulated"]),
    default="vllm",
    show_default=True,
    help="Real answers, or invented ones in the modelled time.",
)
@json_option
def demo(data_dir: Path, port: int, engine: str, as_json: bool) -> None:
    """Run the example files through the whole service and show what came back."""
    output = Output(as_json)
    began = time.monotonic()
    stop = stop_event()
    with Receivers() as receivers:
        settings = settings_for_up(
            data_dir=data_dir,
            port=port,
            engine=engine,
            smtp_url=receivers.smtp_url,
            webhook_allow=("127.0.0.1",),
            public_url=f"http://127.0.0.1:{port}",
        )
        service = EmbeddedService(settings, lambda name, text: output.note(f"  {name}: {text}"))
        output.note("Starting PostgreSQL, Valkey, API, scheduler, files, callbacks and worker …")
        service.start()
        try:
            if not wait_until_ready(service, stop):
                raise ConfigurationError("stopped before the service was ready")
            output.note(f"Ready after {time.monotonic() - began:.1f} s at {service.url}/v1\n")
            report = _Demo(service, receivers, output, stop).run()
        finally:
            output.note("\nStopping everything …")
            service.stop()
    report.check_answers = engine == "vllm"
    report.seconds = time.monotonic() - began
    report.show(output)
    sys.exit(0 if report.passed else 1)


class _Demo:
    """The steps of the demo against a running service."""

    def __init__(
        self,
        service: EmbeddedService,
        receivers: Receivers,
        output: Output,
        stop: threading.Event,
    ) -> None:
        self._service = service
        self._receivers = receivers
        self._output = output
        self._stop = stop
        self._client = Client(service.url, service.key_file.read_text().strip())
        self._results = service.folders.data / "results"
        self._results.mkdir(exist_ok=True)
        # Shown this once; what is signed from now on can be verified with it.
        self._secret: str = self._client.post("/v1/webhooks/secret/rotate", {})["secret"]

    def run(self) -> Report:
        """Submit, follow, fetch, score and look at the callbacks."""
        folder = examples_folder()
        batches = [self._submit(folder / name) for name in ("chat.jsonl", "completions.jsonl")]
        self._follow(batches)
        for batch in batches:
            self._fetch(batch)
        expected: dict[str, Json] = json.loads((folder / "answers.json").read_text())
        webhook, webhook_ok = self._webhook(batches)
        mail, mail_ok = self._mail(batches)
        return Report(batches, score(batches, expected), webhook, webhook_ok, mail, mail_ok)

    def _submit(self, path: Path) -> DemoBatch:
        with path.open("rb") as source:
            record = self._client.upload(source, path.name)
        state = self._client.post(
            "/v1/batches",
            {
                "input_file_id": record["id"],
                "endpoint": json.loads(path.open().readline())["url"],
                "completion_window": "15m",
                "callbacks": {"webhook": self._receivers.webhook_url, "email": "you@example.com"},
            },
        )
        self._output.note(f"Submitted {path.name} ({record['bytes']} bytes) as {state['id']}")
        return DemoBatch(path, time.time(), state)

    def _follow(self, batches: list[DemoBatch]) -> None:
        """Show progress of all batches until they have ended."""
        with Progress(
            TextColumn("{task.description:<34}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[eta]}"),
            console=self._output.errors,
            disable=not self._output.live,
        ) as progress:
            tasks = [progress.add_task(batch.source.name, total=None, eta="") for batch in batches]
            said: dict[str, tuple[str, float]] = {}
            while any(batch.ended is None for batch in batches):
                self._service.check()
                if self._stop.wait(0.3):
                    raise ConfigurationError("stopped before the batches were done")
                for batch, task in zip(batches, tasks, strict=True):
                    if batch.ended is not None:
                        continue
                    self._poll(batch)
                    counts = batch.state["request_counts"]
                    done = counts["completed"] + counts["failed"]
                    progress.update(
                        task,
                        description=f"{batch.source.name} {batch.state['status']}",
                        total=counts["total"] or None,
                        completed=done,
                        eta=eta_text(batch.state),
                    )
                    if not self._output.live:
                        self._say(batch, said)

    def _poll(self, batch: DemoBatch) -> None:
        batch.state = self._client.get(f"/v1/batches/{batch.state['id']}")
        promise = (batch.state.get("qlm") or {}).get("promise") or {}
        if batch.promised is None and promise.get("p50") is not None:
            batch.promised = promise["p50"]
        if batch.state["status"] in ENDED:
            batch.ended = time.time()

    def _say(self, batch: DemoBatch, said: dict[str, tuple[str, float]]) -> None:
        counts, eta = batch.state["request_counts"], eta_text(batch.state)
        text = (
            f"  {batch.source.name:<18} {batch.state['status']:<12} "
            f"{counts['completed'] + counts['failed']}/{counts['total']}  {eta}"
        )
        before, at = said.get(batch.source.name, ("", 0.0))
        if text != before and (time.monotonic() - at > 1 or batch.ended is not None):
            self._output.note(text)
            said[batch.source.name] = (text, time.monotonic())

    def _fetch(self, batch: DemoBatch) -> None:
        for field_name, suffix in (("output_file_id", "results"), ("error_file_id", "errors")):
            file_id = batch.state.get(field_name)
            if file_id is None:
                continue
            path = self._results / f"{batch.source.stem}.{suffix}.jsonl"
            with path.open("wb") as target:
                for chunk in self._client.download(f"/v1/files/{file_id}/content"):
                    target.write(chunk)
            if suffix == "results":
                batch.results = path
            else:
                batch.errors = path

    def _webhook(self, batches: Sequence[DemoBatch]) -> tuple[str, bool]:
        wanted = {batch.state["id"] for batch in batches}

        def announced(receivers: Receivers) -> bool:
            found = {json.loads(hook.body)["data"]["id"] for hook in receivers.webhooks}
            return wanted <= found

        if not self._receivers.wait_for(announced, _CALLBACK_WAIT_S):
            return f"did not arrive within {_CALLBACK_WAIT_S:.0f} s", False
        try:
            for hook in self._receivers.webhooks:
                Webhook(self._secret).verify(hook.body, dict(hook.headers))
        except WebhookVerificationError as error:
            return f"arrived, but its signature is wrong: {error}", False
        types = sorted({json.loads(hook.body)["type"] for hook in self._receivers.webhooks})
        return f"{len(wanted)} arrived ({', '.join(types)}), signatures verified", True

    def _mail(self, batches: Sequence[DemoBatch]) -> tuple[str, bool]:
        wanted = [batch.state["id"] for batch in batches]

        def announced(receivers: Receivers) -> bool:
            return all(any(name in mail.as_string() for mail in receivers.mails) for name in wanted)

        if not self._receivers.wait_for(announced, _CALLBACK_WAIT_S):
            return f"did not arrive within {_CALLBACK_WAIT_S:.0f} s", False
        return f"{len(wanted)} arrived: “{self._receivers.mails[0]['subject']}”", True


def examples_folder() -> Path:
    """The example files: a checkout's, or those that came with the package."""
    package = Path(qlm_batch.__file__).parent
    for folder in (package.parent / "examples", package / "_examples"):
        if (folder / "chat.jsonl").exists():
            return folder
    raise ConfigurationError("the example files are missing from this installation")
