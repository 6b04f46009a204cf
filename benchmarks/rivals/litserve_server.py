"""LitServe over eager torch: a LitAPI with LitServe's batching.

Rules of this file:
- It follows LitServe's documentation: `max_batch_size` and `batch_timeout` on the API, explicit `batch` and `unbatch`,
  the answer as a Response of bytes. The number of workers is `workers_per_device`.

Run by benchmarks/alternatives.py.
"""

import litserve
from fastapi import Response

from rivals.model import Painter, Request
from rivals.settings import WAIT_SECONDS, Settings

settings = Settings.of_environment()


class SampleAPI(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.painter = Painter(settings)

    def decode_request(self, request) -> Request:  # without annotations, LitServe passes the JSON
        return Request(request["seed"], request["truncation_psi"], request["crossover"])

    def batch(self, inputs: list[Request]) -> list[Request]:
        return inputs

    def predict(self, batch: list[Request]) -> list[bytes]:
        return self.painter.bodies(batch)

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        return output

    def encode_response(self, output: bytes) -> Response:
        return Response(output, media_type="application/octet-stream")


if __name__ == "__main__":
    api = SampleAPI(max_batch_size=settings.batch, batch_timeout=WAIT_SECONDS, api_path="/sample")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=settings.workers, timeout=False)
    server.run(host="127.0.0.1", port=settings.port, num_api_servers=1, generate_client_file=False, log_level="warning")
