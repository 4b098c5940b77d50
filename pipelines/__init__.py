"""Diffusers pipelines of this project, importable as `diffkit.pipelines`."""
