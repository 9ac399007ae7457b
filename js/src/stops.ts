// Where the arrow keys stop: blocks and glyphs in the order they ran, an unfolded block before what is inside it.

/** The names of the stops among a drawing's marks. */
export function stopsOf(marks: Iterable<SVGGraphicsElement>): string[] {
  const stops = new Map<string, DOMRect>();
  const plates = new Map<string, DOMRect>();
  for (const mark of marks) {
    const { role, op, block } = mark.dataset;
    const name = op || block;
    if (!name || role === "title") continue;
    const kind = role === "plate" ? plates : stops;
    if (!kind.has(name)) kind.set(name, mark.getBBox());
  }
  const order = [...stops.keys()];
  for (const [name, plate] of plates) {
    const first = order.findIndex((stop) => {
      const box = stops.get(stop);
      return box !== undefined && holds(plate, box.x + box.width / 2, box.y + box.height / 2);
    });
    order.splice(first < 0 ? order.length : first, 0, name);
  }
  return order;
}

function holds(box: DOMRect, x: number, y: number): boolean {
  return x >= box.x && x <= box.x + box.width && y >= box.y && y <= box.y + box.height;
}
