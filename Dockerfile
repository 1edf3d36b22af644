# API, scheduler, files and callbacks: no engine inside.
FROM python:3.12-slim AS build
RUN pip install --no-cache-dir build
WORKDIR /src
COPY pyproject.toml README.md ./
COPY qlm_batch qlm_batch
COPY workers workers
COPY cli cli
COPY migrations migrations
COPY examples examples
RUN python -m build --wheel --outdir /dist

FROM python:3.12-slim AS service
RUN useradd --create-home --uid 10001 qlm && mkdir /data && chown qlm:qlm /data
COPY --from=build /dist/*.whl /tmp/
RUN pip install --no-cache-dir /tmp/*.whl && rm /tmp/*.whl
USER qlm
ENV QLM_DATA_DIR=/data QLM_LOG_JSON=true
VOLUME /data
ENTRYPOINT ["qlm"]
CMD ["--help"]

# One instance: the same wheel beside vLLM's own CUDA image.
FROM vllm/vllm-openai:v0.26.0 AS worker
# A new volume is as its folder in the image: models are loaded into it by an unprivileged user.
RUN useradd --create-home --uid 10001 qlm && mkdir -p /data /home/qlm/.cache/huggingface && \
    chown -R qlm:qlm /data /home/qlm/.cache
COPY --from=build /dist/*.whl /tmp/
RUN pip install --no-cache-dir /tmp/*.whl && rm /tmp/*.whl
USER qlm
ENV QLM_DATA_DIR=/data QLM_LOG_JSON=true
VOLUME /data
ENTRYPOINT ["qlm"]
CMD ["worker"]
