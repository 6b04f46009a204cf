// Paints strokes as the server understands them: pixels within a radius of a line, polygons, regions in run lengths.

// A canvas of the image's size with the drawn pixels in their classes' colours, transparent elsewhere.
export function painted(strokes, size, colours) {
  const canvas = new OffscreenCanvas(size, size);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const image = context.createImageData(size, size);
  const pixels = new Uint32Array(image.data.buffer);
  for (const stroke of strokes) paintStroke(pixels, size, stroke, stroke.tool === "erase" ? 0 : word(colours[stroke.class]));
  context.putImageData(image, 0, 0);
  return canvas;
}

// The colour of a class, and a share of the pixels that are drawn in it.
export function word(rgb) {
  return ((255 << 24) | (rgb[2] << 16) | (rgb[1] << 8) | rgb[0]) >>> 0;
}

function paintStroke(pixels, size, stroke, colour) {
  if (stroke.region) paintRuns(pixels, stroke.region, colour);
  else if (stroke.tool === "polygon") paintPolygon(pixels, size, stroke.points, colour);
  else paintLine(pixels, size, stroke, colour);
}

function paintRuns(pixels, runs, colour) {
  let at = 0;
  runs.forEach((length, index) => {
    if (index % 2 === 1) pixels.fill(colour, at, at + length);
    at += length;
  });
}

function paintLine(pixels, size, { points, radius }, colour) {
  for (let index = 0; index < Math.max(points.length - 1, 1); index++) {
    const [x0, y0] = points[index];
    const [x1, y1] = points[Math.min(index + 1, points.length - 1)];
    const top = Math.max(Math.floor(Math.min(y0, y1) - radius), 0);
    const bottom = Math.min(Math.ceil(Math.max(y0, y1) + radius), size - 1);
    const left = Math.max(Math.floor(Math.min(x0, x1) - radius), 0);
    const right = Math.min(Math.ceil(Math.max(x0, x1) + radius), size - 1);
    const along = (x1 - x0) ** 2 + (y1 - y0) ** 2 || 1;
    for (let y = top; y <= bottom; y++) {
      for (let x = left; x <= right; x++) {
        const share = Math.min(Math.max(((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / along, 0), 1);
        const far = (x - x0 - share * (x1 - x0)) ** 2 + (y - y0 - share * (y1 - y0)) ** 2;
        if (far <= radius * radius) pixels[y * size + x] = colour;
      }
    }
  }
}

function paintPolygon(pixels, size, points, colour) {
  const canvas = new OffscreenCanvas(size, size);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.translate(0.5, 0.5);
  context.beginPath();
  points.forEach(([x, y]) => context.lineTo(x, y));
  context.closePath();
  context.fill();
  context.stroke();
  const alpha = context.getImageData(0, 0, size, size).data;
  for (let index = 0; index < pixels.length; index++) if (alpha[4 * index + 3] > 127) pixels[index] = colour;
}
