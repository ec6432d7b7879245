"""An HTTP server like OpenAI's over one `emoe.Engine`. docs/serving.md. It needs emoe[serve]."""
