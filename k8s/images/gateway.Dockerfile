# The gateway, with no torch and no Triton. Build it from the root of the repository:
#   docker buildx build --push --file k8s/images/gateway.Dockerfile --tag REGISTRY/labelmint/gateway .
FROM python:3.12-slim-bookworm@sha256:782412e85d0f0984994c290652577d4018aff08145c85b262bb63dc0c7522254 AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY service service
RUN python -m venv /opt/labelmint \
    && /opt/labelmint/bin/pip install --no-cache-dir --prefer-binary '.[docs,tracing]'

FROM python:3.12-slim-bookworm@sha256:782412e85d0f0984994c290652577d4018aff08145c85b262bb63dc0c7522254
# Fonts for class and keypoint names in pictures, in any script.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends fonts-dejavu-core=2.37-6 fonts-unifont=1:15.0.01-2 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/labelmint /opt/labelmint
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
EXPOSE 8080 50051
ENTRYPOINT ["/opt/labelmint/bin/labelmint"]
CMD ["serve"]
