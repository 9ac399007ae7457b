"""Live views in a notebook: the one place, with `plots`, where ipywidgets, anywidget and plotly appear."""
