// Prints samples of a model: node print_samples.mjs [HOST:PORT [MODEL [COUNT]]]
import { createHash } from "node:crypto";
import { connect, getModel, streamSamples } from "./labelmint.mjs";

const [endpoint = "localhost:50051", model = "faces", count = "3"] = process.argv.slice(2);
const sha256 = (bytes) => createHash("sha256").update(bytes).digest("hex");

const client = connect(endpoint);
const { task, classes, keypointClasses, resolution } = await getModel(client, model);
const [what, named] = task === "keypoints" ? ["keypoints", keypointClasses] : ["classes", classes];
console.log(`${model}: ${resolution}x${resolution}, ${what} ${named.map(({ name }) => name).join(", ")}`);
for await (const { seed, jsScore, image, label, keypoints } of streamSamples(client, { model, count: Number(count) })) {
  const labels = label ? sha256(label.data) : keypoints.map(({ x, y }) => `${x},${y}`).join(" ");
  console.log(seed, jsScore, sha256(image.data), labels);
}
client.close();
