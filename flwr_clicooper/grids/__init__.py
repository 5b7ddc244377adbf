"""How messages travel: in-process, or over any Flower ``Grid``."""
