# The models that are served, which an init container copies. `make images` builds it; .dockerignore leaves out the
# staged pipelines.
FROM debian:bookworm-slim
COPY model_repository /model_repository
USER 1000:1000
