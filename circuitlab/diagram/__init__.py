"""Circuit -> scene -> SVG or text. Pure: no torch, no tracer, no numbers but the layout's own."""
