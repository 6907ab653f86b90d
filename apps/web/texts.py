"""Every text of the page, in English and Chinese."""

from apps.web.descriptions import CHINESE

LANGUAGES = {"en": "English", "zh": "中文"}

TEXTS = {  # key: (English, Chinese)
    "title": ("RLHF for the ChatGLM family", "ChatGLM 系列的 RLHF 流程"),
    "refresh": ("Refresh", "刷新"),
    "kept": ("Kept in {file}.", "已写入 {file}。"),
    "tab.train": ("Train", "训练"),
    "tab.runs": ("Runs", "记录"),
    "tab.data": ("Data", "数据"),
    "tab.chat": ("Chat", "对话"),
    "tab.rank": ("Rank", "排序"),
    "tab.models": ("Models", "模型"),
    "tab.export": ("Export", "导出"),
    "form.model": ("Model", "基座模型"),
    "form.data": ("Data", "数据"),
    "form.sft": ("SFT", "监督微调"),
    "form.reward": ("Reward model", "奖励模型"),
    "form.policy": ("Policy", "策略优化"),
    "form.more": ("Evaluate, export, promote", "评估、导出与上线"),
    "train.until": ("Run up to this step", "运行到哪一步"),
    "train.until_info": (
        "Steps that are up to date are taken from the cache. Nothing is registered if the last steps are left out.",
        "没有变化的步骤直接取自缓存；没有跑完最后一步时，不会登记模型。",
    ),
    "train.everything": ("export: everything, then register as challenger", "export：全部步骤，并登记为 challenger"),
    "train.start": ("Start", "开始"),
    "train.stop": ("Stop", "停止"),
    "train.resume": ("Resume", "继续"),
    "train.run": ("Run", "任务"),
    "train.log": ("Log", "日志"),
    "train.no_run": ("No run was started here yet.", "还没有从这里启动过任务。"),
    "train.started": (
        "Run {name} has started. It goes on without this page.",
        "任务 {name} 已启动；关闭页面也会继续运行。",
    ),
    "train.preparing": ("Getting ready …", "正在准备……"),
    "train.clock": ("{gone} gone, about {left} to go", "已用 {gone}，大约还需 {left}"),
    "train.cached": ("from the cache", "取自缓存"),
    "train.changes": ("Differences to params.yaml", "与 params.yaml 的差别"),
    "train.no_changes": ("None: the run uses params.yaml as it is.", "没有差别：按 params.yaml 原样运行。"),
    "train.parameter": ("parameter", "参数"),
    "train.now": ("here", "此处"),
    "train.in_workspace": (
        "Runs on the last commit in a workspace of its own, and is kept as a DVC experiment.",
        "在独立的工作区里按最近一次提交运行，结果保存为一个 DVC 实验。",
    ),
    "train.in_checkout": ("Runs in this checkout, on the files as they are.", "直接在当前目录里运行，使用现有文件。"),
    "train.command": ("The same from a terminal", "等价的命令行"),
    "state.running": ("running", "运行中"),
    "state.stopping": ("stopping", "正在停止"),
    "state.done": ("done", "已完成"),
    "state.failed": ("failed", "失败"),
    "state.refused": ("refused: see the log", "被拒绝：见日志"),
    "state.stopped": ("stopped", "已停止"),
    "state.killed": ("killed", "进程被杀"),
    "runs.about": (
        "The pipeline's runs in MLflow, the newest first; results are the policy's on the test split. All of it: "
        "`make ui`, then {pages}",
        "MLflow 里的流程记录，最新的在最前；结果是策略模型在测试集上的指标。完整内容：`make ui`，然后打开 {pages}",
    ),
    "runs.chosen": ("Runs to compare", "要对比的记录"),
    "runs.curve": ("Curve", "曲线"),
    "runs.differ": ("Parameters that differ", "不同的参数"),
    "runs.results": ("Results", "结果"),
    "runs.no_curve": ("None of these runs has this curve of its own.", "所选记录没有自己的这条曲线。"),
    "data.dataset": ("dataset", "数据集"),
    "data.source": ("source", "来源"),
    "data.use": ("use", "用途"),
    "data.use_info": ("Rows are shown as this use reads them", "按这种用途的读法显示各行"),
    "data.first_row": ("from row", "起始行"),
    "data.row": ("row", "行"),
    "data.check": ("Check all rows", "检查全部行"),
    "data.report": ("Report of the last preprocessing", "最近一次预处理的报告"),
    "data.here": ("here", "本机"),
    "data.elsewhere": ("is downloaded when used", "使用时下载"),
    "data.missing": ("missing", "缺失"),
    "data.not_here": (
        "dataset {name!r} is not on this machine: a run that uses it downloads it first",
        "数据集 {name!r} 不在本机：使用它的任务会先下载",
    ),
    "data.no_rows": ("There are no rows from here on.", "从这里起没有更多行。"),
    "data.no_report": ("There is none yet: the step preprocess writes it.", "还没有：由 preprocess 步骤生成。"),
    "chat.left": ("Model on the left", "左侧模型"),
    "chat.right": ("Model on the right (may be empty)", "右侧模型（可留空）"),
    "chat.model_info": (
        "folder, hub id, models:/NAME@champion, models:/NAME/3, or an MLflow run",
        "文件夹、hub 名称、models:/NAME@champion、models:/NAME/3，或 MLflow 运行的 id",
    ),
    "chat.empty": ("The model is loaded with the first question.", "第一次提问时加载模型。"),
    "chat.question": ("Ask both …", "向两个模型提问……"),
    "chat.send": ("Send", "发送"),
    "chat.stop": ("Stop", "停止"),
    "chat.regenerate": ("Regenerate", "重新生成"),
    "chat.clear": ("Clear", "清空"),
    "chat.left_better": ("◀ Left is better", "◀ 左边更好"),
    "chat.right_better": ("Right is better ▶", "右边更好 ▶"),
    "chat.settings": ("Settings", "设置"),
    "chat.system": ("System prompt", "系统提示"),
    "chat.system_info": ("Empty: the one of training, if any", "留空则使用训练时的系统提示（如有）"),
    "chat.temperature_info": ("0: the likeliest token each time", "0：每次取概率最高的词元"),
    "chat.no_question": ("Type a question first.", "请先输入问题。"),
    "chat.answering": (
        "An answer is on its way: wait, or stop it.",
        "回答还在生成：请等待结束，或先停止。",
    ),
    "chat.nothing_yet": ("There is no answer yet to judge.", "还没有可以评价的回答。"),
    "chat.not_the_same": (
        "The two dialogues differ before this answer: clear them and ask anew, so that both answer the same.",
        "两边在这次回答之前的对话不同：请清空后重新提问，让两边回答同样的内容。",
    ),
    "rank.about": (
        "Put the answers in order, the best on top; leave out what is of no use. A ranking is a row of "
        "`data/feedback/rankings.jsonl`, from which the reward model learns (`data.reward: feedback`).",
        "把回答按好坏排序，最好的在最上面；没用的可以去掉。每个排序写成 `data/feedback/rankings.jsonl` 的一行，"
        "奖励模型从中学习（`data.reward: feedback`）。",
    ),
    "rank.model": ("Model", "模型"),
    "rank.prompt": ("Prompt", "提示"),
    "rank.count": ("Answers", "回答个数"),
    "rank.generate": ("Answer", "生成回答"),
    "rank.keep": ("Keep this order", "保存这个顺序"),
    "rank.no_prompt": ("Type a prompt first.", "请先输入提示。"),
    "rank.too_few": ("A ranking takes at least two different answers.", "排序至少需要两个不同的回答。"),
    "models.version": ("version", "版本"),
    "models.aliases": ("aliases", "别名"),
    "models.registered": ("registered", "登记时间"),
    "models.gate": ("gate", "关卡"),
    "models.why": ("why", "原因"),
    "models.at": ("when", "时间"),
    "models.action": ("what", "操作"),
    "models.before": ("before", "之前"),
    "models.by": ("by", "操作者"),
    "models.moves": ("Moves of the alias champion", "champion 别名的变更"),
    "models.none": (
        "No model is registered yet: a finished run registers its result.",
        "还没有登记的模型：跑完的任务会登记结果。",
    ),
    "models.reason": ("Reason", "原因"),
    "models.reason_info": ("Kept with the version", "与版本一起保存"),
    "models.promote": ("Promote", "设为 champion"),
    "models.rollback": ("Roll back", "回退"),
    "models.promoted": (
        "{name} version {version} is the champion (before: {before}).",
        "{name} 的版本 {version} 现在是 champion（之前：{before}）。",
    ),
    "models.is_already": (
        "{name} version {version} is the champion already.",
        "{name} 的版本 {version} 已经是 champion。",
    ),
    "models.rolled_back": (
        "{name} version {version} is the champion again (before: {before}).",
        "{name} 的版本 {version} 重新成为 champion（之前：{before}）。",
    ),
    "models.lineage": ("Draw the lineage", "画出来历"),
    "models.lineage_of": ("Lineage of", "查看来历"),
    "models.lineage_info": (
        "models:/NAME@ALIAS, models:/NAME/VERSION, a run's id, or a folder that a run made",
        "models:/NAME@ALIAS、models:/NAME/VERSION、运行的 id，或某次运行生成的文件夹",
    ),
    "export.model": ("Model", "模型"),
    "export.out": ("Folder below exports/", "exports/ 下的文件夹"),
    "export.out_info": ("It must not be there yet.", "不能是已有的文件夹。"),
    "export.dtype_info": ("Empty: as it is stored", "留空：与存储时相同"),
    "export.hub_info": ("owner/name on the hub: sent there when it is done", "hub 上的 owner/name：导出完成后上传"),
    "export.start": ("Export", "导出"),
    "export.busy": ("An export is at work already.", "已有导出正在进行。"),
    "export.done": ("Exported, loaded again and compared with its source.", "已导出，并重新加载与来源核对。"),
    "export.stopped": ("stopped", "已停止"),
}


class Texts:
    """The texts of one language: `text("train.start")`, with values for the names in braces."""

    def __init__(self, language: str) -> None:
        self.column = list(LANGUAGES).index(language)

    def __call__(self, key: str, **values: object) -> str:
        return TEXTS[key][self.column].format(**values)

    def describe(self, description: str) -> str:
        """A parameter's description, which the schema has in English."""
        return CHINESE.get(description, description) if self.column else description
