# a decode worker
ARG BASE_IMAGE=python:3.12-slim-bookworm

FROM ${BASE_IMAGE} AS build
# Where torch comes from: a CPU build. docker/compose.gpu.yaml sets it empty: the CUDA build of the default index.
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
# Without a network: fill docker/wheelhouse and build with PIP_NO_INDEX=1.
ARG PIP_NO_INDEX=""
COPY docker/wheelhouse /wheelhouse
RUN python3 -m venv /opt/forepage
COPY pyproject.toml README.md LICENSE /source/
COPY services /source/services
COPY kernels /source/kernels
RUN /opt/forepage/bin/pip install --no-cache-dir --find-links /wheelhouse '/source[worker]'

FROM ${BASE_IMAGE}
# On a GPU Triton compiles its launchers with a C compiler: docker/compose.gpu.yaml asks for one.
ARG APT_PACKAGES=""
RUN if [ -n "$APT_PACKAGES" ]; then apt-get update && apt-get install -y --no-install-recommends $APT_PACKAGES \
    && rm -rf /var/lib/apt/lists/*; fi
COPY --from=build /opt/forepage /opt/forepage
ENV PATH=/opt/forepage/bin:$PATH PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
USER 10001:10001
EXPOSE 7103
HEALTHCHECK --interval=5s --timeout=5s --start-period=120s --retries=3 CMD ["forepage", "healthy", "worker"]
ENTRYPOINT ["forepage"]
CMD ["worker"]
