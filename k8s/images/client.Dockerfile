# The client's `pull` and `verify`, for k8s/jobs. Build it from the root of the repository:
#   docker buildx build --push --file k8s/images/client.Dockerfile --tag REGISTRY/labelmint/client .
FROM python:3.12-slim-bookworm@sha256:782412e85d0f0984994c290652577d4018aff08145c85b262bb63dc0c7522254 AS build
WORKDIR /source
COPY clients/python .
RUN python -m venv /opt/labelmint \
    && /opt/labelmint/bin/pip install --no-cache-dir --prefer-binary '.[pull]'

FROM python:3.12-slim-bookworm@sha256:782412e85d0f0984994c290652577d4018aff08145c85b262bb63dc0c7522254
COPY --from=build /opt/labelmint /opt/labelmint
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
ENTRYPOINT ["/opt/labelmint/bin/python", "-m", "labelmint_client"]
