"""The page in one language: its head, and a tab for each module."""

import gradio as gr

from apps.web import chat, data, export, models, rank, runs, train
from apps.web.loaded import Models
from apps.web.texts import LANGUAGES, Texts


def build(language: str, answering: Models) -> gr.Blocks:
    """All components and events. `answering` are the models that chat and rank ask."""
    text = Texts(language)
    with gr.Blocks(title="glmflow", analytics_enabled=False, fill_width=True) as page:
        links = " · ".join(
            f"<b>{label}</b>" if code == language else f"<a href='../{code}/'>{label}</a>"
            for code, label in LANGUAGES.items()
        )
        gr.HTML(f"<header><span class='brand'>glmflow</span><span>{text('title')}</span><nav>{links}</nav></header>")
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab(text("tab.train"), id="train"):
                train.build(page, text)
            with gr.Tab(text("tab.runs"), id="runs") as tab:
                runs.build(tab, text)
            with gr.Tab(text("tab.data"), id="data") as tab:
                data.build(tab, text)
            with gr.Tab(text("tab.chat"), id="chat"):
                chat.build(text, answering)
            with gr.Tab(text("tab.rank"), id="rank"):
                rank.build(text, answering)
            with gr.Tab(text("tab.models"), id="models") as tab:
                models.build(tab, text)
            with gr.Tab(text("tab.export"), id="export"):
                export.build(text)
    return page.queue(default_concurrency_limit=8, max_size=256, api_open=False)


def theme() -> gr.themes.Base:
    """System fonts: nothing is fetched from elsewhere."""
    sans = ["system-ui", "-apple-system", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"]
    mono = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
    base = gr.themes.Soft(
        primary_hue="indigo", neutral_hue="slate", radius_size="sm", spacing_size="sm", text_size="sm",
        font=sans, font_mono=mono,
    )  # fmt: skip
    return base.set(
        block_title_background_fill="none",
        block_title_text_color="*body_text_color",
        block_title_padding="0",
        block_border_width="1px",
        input_border_width="1px",
        input_background_fill="*neutral_50",
        checkbox_border_width="1px",
    )
