"""The web page, `glmflow web`: one module a tab. What a tab does is done by flows, apps and glm; it shows and asks."""
