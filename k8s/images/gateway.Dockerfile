# The gateway, with no torch and no Triton. `make images` builds it.
FROM debian:bookworm-slim AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv=3.11.2-1+b1 \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/pip \
    && python3 -m venv --without-pip /opt/labelmint
WORKDIR /source
COPY pyproject.toml README.md LICENSE requirements.lock ./
COPY service service
RUN /opt/pip/bin/pip --python /opt/labelmint/bin/python install --no-cache-dir --prefer-binary \
    --constraint requirements.lock '.[docs,index,tracing]' \
    && find /opt/labelmint -type d -name tests -prune -exec rm -r '{}' +

FROM debian:bookworm-slim
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3=3.11.2-1+b1 \
    && rm -rf /var/lib/apt/lists/*
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
