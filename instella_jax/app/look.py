"""How the page looks: theme and style sheet, with the fonts of the visitor's own machine."""

from typing import Any

SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")

CSS = """
span[data-testid="block-info"] { background: none !important; padding: 0 !important;
  color: var(--body-text-color) !important; }
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; }
#head h1 { margin: 0 0 2px; font-size: 1.6rem; letter-spacing: -0.01em; }
#head p { margin: 0; opacity: .75; }
#examples .gr-samples-table td, #examples button { white-space: normal; }
.pictures { display: grid; gap: 8px; grid-template-columns: repeat(var(--across, 1), 1fr); }
.pictures img { width: 100%; display: block; border-radius: 8px; image-rendering: pixelated;
  background: var(--background-fill-secondary); }
.shown { max-width: 560px; margin: 0 auto; }
.empty { aspect-ratio: 1; max-width: 560px; margin: 0 auto; display: grid; place-items: center;
  border: 1.5px dashed var(--border-color-primary); border-radius: 10px; text-align: center;
  color: var(--body-text-color-subdued); padding: 2rem; }
.bar { height: 4px; border-radius: 2px; background: var(--border-color-primary); margin: 10px 0 6px;
  overflow: hidden; }
.bar > i { display: block; height: 100%; background: var(--color-accent); }
.said { color: var(--body-text-color-subdued); font-size: .9rem; min-height: 1.4em; }
.notice { border-left: 3px solid #e11d48; padding: 8px 12px; border-radius: 4px;
  background: color-mix(in srgb, #e11d48 10%, transparent); color: var(--body-text-color); }
#gallery img { image-rendering: pixelated; }
#gallery .grid-wrap, #gallery .grid-container { max-height: none !important; height: auto; }
#gallery, #gallery .grid-wrap { max-width: 584px; margin: 0 auto; width: 100%; }
#seed-row { align-items: end; }
figure.part { margin: 0; align-content: start; }
figure.part figcaption { font-size: .85rem; margin-top: 4px;
  color: var(--body-text-color-subdued); }
figure.part b { color: var(--body-text-color); font-weight: 600; }
.parts { display: grid; gap: 14px; grid-template-columns: 1fr 1fr; }
table.bytes { width: 100%; border-collapse: collapse; margin-top: 14px; font-size: .92rem; }
table.bytes, table.bytes :is(thead, tbody, tr, th, td) { border: 0 !important; }
table.bytes th, table.bytes td { padding: 6px 8px !important; text-align: left;
  border-bottom: 1px solid var(--border-color-primary) !important; }
table.bytes td.number, table.bytes th.number { text-align: right;
  font-variant-numeric: tabular-nums; }
table.bytes tr.ours td { font-weight: 600; color: var(--color-accent); }
.words { columns: 3 8em; font-size: .9rem; line-height: 1.5; }
footer { display: none !important; }
.prose pre { max-width: 100%; overflow-x: auto; }
@media (max-width: 640px) {
  .prose pre, .prose pre code { white-space: pre-wrap; overflow-wrap: anywhere; }
  .words { columns: 2 7em; }
  .gradio-container { padding: 8px !important; }
}
"""


def theme() -> Any:
    """Return the page's theme."""
    import gradio as gr

    return gr.themes.Soft(
        primary_hue=gr.themes.colors.teal,
        secondary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_md,
        font=[gr.themes.Font(name) for name in SANS],
        font_mono=[gr.themes.Font(name) for name in MONO],
    )
