# One image for every daemon and client: `docker build -t raftkv .`, then `docker run raftkv --help`.
# Where no image registry is reached, scripts/base-image makes a stand-in for the base image.
ARG BASE_IMAGE=python:3.11-slim-bookworm

# What never changes comes first and is built once: each line costs the classic builder seconds.
FROM ${BASE_IMAGE} AS runtime
RUN useradd --uid 10001 --create-home raftkv && install --directory --owner raftkv --group raftkv /data
ENV PATH=/opt/raftkv/bin:$PATH RAFTKV_LISTEN=0.0.0.0:8000 RAFTKV_DATA_DIR=/data
USER raftkv
WORKDIR /home/raftkv
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=20s --timeout=10s --start-period=60s CMD ["raftkv", "health"]
ENTRYPOINT ["raftkv"]

FROM ${BASE_IMAGE} AS packages
# The classic builder keeps these stages: docker image prune --filter label=raftkv.stage=build
LABEL raftkv.stage=build
WORKDIR /src
COPY requirements.lock ./
RUN python3 -m venv /opt/raftkv && \
    /opt/raftkv/bin/pip install --no-cache-dir --require-hashes --only-binary :all: --requirement requirements.lock

FROM packages AS build
COPY pyproject.toml README.md LICENSE ./
COPY raftkv raftkv
RUN /opt/raftkv/bin/pip install --no-cache-dir --no-deps --no-build-isolation . && \
    /opt/raftkv/bin/pip uninstall --yes --quiet setuptools pip

FROM runtime
COPY --from=build /opt/raftkv /opt/raftkv
