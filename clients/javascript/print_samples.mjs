// Prints samples of a model: node print_samples.mjs [HOST:PORT [MODEL [COUNT]]]
import { createHash } from "node:crypto";
import { connect, getModel, streamSamples } from "./labelmint.mjs";

const [endpoint = "localhost:50051", model = "faces", count = "3"] = process.argv.slice(2);
const sha256 = (bytes) => createHash("sha256").update(bytes).digest("hex");

const client = connect(endpoint);
const { classes, resolution } = await getModel(client, model);
console.log(`${model}: ${resolution}x${resolution}, classes ${classes.map(({ name }) => name).join(", ")}`);
for await (const sample of streamSamples(client, { model, count: Number(count) })) {
  console.log(sample.seed, sample.jsScore, sha256(sample.image.data), sha256(sample.label.data));
}
client.close();
