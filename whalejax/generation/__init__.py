"""Generation: a paged latent cache, an engine that decodes in fixed slots, and sampling."""
