"""The OpenAPI document, driven by schemathesis: whatever it allows or forbids, answers conform."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from qlm_batch.api.app import create_app
from qlm_batch.api.services import ApiServices
from qlm_batch.intake.blobs import LocalBlobs
from qlm_batch.settings import Settings
from qlm_batch.store.memory import MemoryStore
from tests.api_support import Site, input_file, make_site, submit, upload

CHECKS = (
    schemathesis.checks.not_a_server_error,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)


def _operations() -> list[tuple[str, str, GenerationMode]]:
    """Every operation that needs no engine, with good input and, where it takes any, with bad."""
    parts = ApiServices(MemoryStore(now=time.time), LocalBlobs(Path("unused")), Settings())
    paths = create_app(parts).openapi()["paths"]
    return [
        (path, method.upper(), mode)
        for path, operations in paths.items()
        for method, operation in operations.items()
        for mode in GenerationMode
        if mode.is_positive or operation.keys() & {"parameters", "requestBody"}
        if not path.startswith(("/v1/chat", "/v1/completions", "/v1/embeddings"))
    ]


OPERATIONS = _operations()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A service with something in it."""
    made = make_site(tmp_path_factory.mktemp("site"))
    with made.client() as client:
        submit(client, input_file("a", "b"))
        made.read_in()
        made.run()
        made.write_out()
        submit(client, input_file("c"))
        upload(client, input_file("d"))
    return made


@pytest.fixture(scope="module")
def document(site: Site) -> Any:
    """The document, and behind it the service."""
    return schemathesis.openapi.from_asgi("/openapi.json", site.app)


@pytest.fixture(scope="module")
def key(site: Site) -> str:
    """An admin's key, so that nothing is refused for its role."""
    return site.key(role="admin")


@pytest.mark.parametrize(("path", "method", "mode"), OPERATIONS)
@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_every_answer_is_as_the_document_says(
    document: Any, key: str, path: str, method: str, mode: GenerationMode, data: st.DataObject
) -> None:
    case = data.draw(document[path][method].as_strategy(generation_mode=mode), label="case")
    case.call_and_validate(checks=CHECKS, headers={"Authorization": f"Bearer {key}"})


def test_objects_that_exist_are_shown_as_the_document_says(
    site: Site, document: Any, key: str
) -> None:
    headers = {"Authorization": f"Bearer {key}"}
    batches = site.store.list_batches("acme").items
    files = site.store.list_files("acme").items
    assert len(batches) >= 2 and len(files) >= 4
    for batch in batches:
        for path in ("", "/deliveries", "/decisions"):
            operation = document[f"/v1/batches/{{batch_id}}{path}"]["GET"]
            operation.Case(path_parameters={"batch_id": batch.id}).call_and_validate(
                checks=CHECKS, headers=headers
            )
    for file in files:
        for path in ("", "/content"):
            operation = document[f"/v1/files/{{file_id}}{path}"]["GET"]
            operation.Case(path_parameters={"file_id": file.id}).call_and_validate(
                checks=CHECKS, headers=headers
            )
    for path in ("/v1/batches", "/v1/files", "/v1/models"):
        document[path]["GET"].Case().call_and_validate(checks=CHECKS, headers=headers)
