// Cloudflare's local R2 in workerd, with its S3 endpoint: node r2_emulator.mjs PORT FOLDER BUCKET ACCESS_KEY_ID
// The secret access key is in SECRET_ACCESS_KEY. Ends on SIGTERM; prints "ready" when it serves.
import { convertV4MiniflareOptions, Miniflare } from "miniflare";

const [port, folder, bucket, accessKeyId] = process.argv.slice(2);
const emulator = new Miniflare(
  convertV4MiniflareOptions({
    host: "127.0.0.1",
    port: Number(port),
    cf: false, // the default sends a request to Cloudflare
    resourcePersistencePath: folder,
    modules: true,
    compatibilityDate: "2025-01-01",
    script: "export default { fetch: () => new Response(null, { status: 404 }) }",
    r2Buckets: { R2: { id: bucket, s3Credentials: { accessKeyId, secretAccessKey: process.env.SECRET_ACCESS_KEY } } },
  }),
);
await emulator.ready;
process.stdout.write("ready\n");
process.on("SIGTERM", async () => {
  await emulator.dispose();
  process.exit(0);
});
