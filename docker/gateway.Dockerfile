# the HTTP edge; installs no torch
ARG BASE_IMAGE=python:3.12-slim-bookworm

FROM ${BASE_IMAGE} AS build
# Without a network: fill docker/wheelhouse and build with PIP_NO_INDEX=1.
ARG PIP_NO_INDEX=""
COPY docker/wheelhouse /wheelhouse
RUN python3 -m venv /opt/forepage
COPY pyproject.toml README.md LICENSE /source/
COPY services /source/services
COPY kernels /source/kernels
RUN /opt/forepage/bin/pip install --no-cache-dir --find-links /wheelhouse '/source[gateway]'

FROM ${BASE_IMAGE}
COPY --from=build /opt/forepage /opt/forepage
ENV PATH=/opt/forepage/bin:$PATH PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=5s --timeout=5s --start-period=120s --retries=3 CMD ["forepage", "healthy", "gateway"]
ENTRYPOINT ["forepage"]
CMD ["gateway"]
