# The client's `pull` and `verify`, for k8s/jobs. `make images` builds it.
FROM debian:bookworm-slim AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv=3.11.2-1+b1 \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/pip \
    && python3 -m venv --without-pip /opt/labelmint
WORKDIR /source
COPY requirements.lock ./
COPY clients/python client
RUN /opt/pip/bin/pip --python /opt/labelmint/bin/python install --no-cache-dir --prefer-binary \
    --constraint requirements.lock './client[pull,s3]' \
    && find /opt/labelmint -type d -name tests -prune -exec rm -r '{}' +

FROM debian:bookworm-slim
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3=3.11.2-1+b1 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/labelmint /opt/labelmint
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
ENTRYPOINT ["/opt/labelmint/bin/python", "-m", "labelmint_client"]
