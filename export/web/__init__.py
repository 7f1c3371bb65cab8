"""A static site, or one HTML file, in which a browser draws: what ``coalescer-export web`` writes."""
