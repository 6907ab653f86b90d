"""The schema's descriptions in Chinese; one that is missing here is shown in English."""

CHINESE = {
    "of training and sampling; data and base keep their own": "训练与采样的随机种子；数据和基座模型另有自己的种子",
    "what the policy step improves the SFT model by": "策略步骤用哪种算法改进 SFT 模型",
    "'embedded', a folder, or a hub id": "embedded（内置小模型）、文件夹或 hub 名称",
    "hub commit; recorded, and required to be able to reproduce a run": "hub 上的提交；会被记录，复现时需要",
    "frozen weights in 4 or 8 bits: bitsandbytes (nf4, fp4, int8), or the authors' (cpm-…)": (
        "冻结权重用 4 或 8 位：bitsandbytes（nf4、fp4、int8），或原作者的格式（cpm-…）"
    ),
    "vllm: a server that gets the LoRA before each batch": "vllm：由服务器采样，每批之前把 LoRA 交给它",
    "vllm: of `vllm serve BASE --enable-lora`, on this machine": (
        "vllm：本机上 `vllm serve BASE --enable-lora` 的地址"
    ),
    "of nf4 and fp4: the scales are quantised too": "用于 nf4 和 fp4：缩放系数也做量化",
    "folders of adapters you trained before, applied in this order under everything": (
        "之前训练好的适配器文件夹，按此顺序叠加在最底层"
    ),
    "sentencepiece pieces, before the special tokens": "sentencepiece 词表大小，不含特殊词元",
    "key/value heads": "键/值头数",
    "tokens of one optimizer step": "每个优化步的词元数",
    "of its weights and the order of its text": "其权重与文本顺序的随机种子",
    "plain text for the embedded base model; else empty": "内置基座模型所用的纯文本；其他模型留空",
    "answers labelled good or bad, for methods that learn from them": "标注了好或坏的回答，供 KTO 等方法使用",
    "what weights are shares of": "权重按样本还是按词元计算",
    "weights leave rows out until they fit, or repeat rows until all are used": (
        "按权重丢弃一部分样本，或重复样本直到全部用上"
    ),
    "rows kept per dataset and split, chosen by their hash": "每个数据集、每个划分保留的行数，按哈希选取",
    "which rows max_samples and weights choose": "决定 max_samples 和权重选中哪些行",
    "near: rows that differ in case, width, blanks or sentence punctuation only count as equal": (
        "near：仅大小写、全半角、空白或句末标点不同的行视为相同"
    ),
    "tokens of the prompt; old rounds are cut first": "提示的最大词元数；先截去最早的轮次",
    "tokens of the answer": "回答的最大词元数",
    "system prompt, joined by a newline in training and in chat alike": "系统提示；训练和对话时都用换行连接",
    "what is trained: a LoRA, a prefix, a few layers, or every weight": "训练什么：LoRA、前缀、部分层，或全部权重",
    "start as a copy of what the stage below trained (SFT: of the last of model.adapters) if it is of this method; "
    "false: fresh, on top of it": (
        "若方法相同，从下一级的训练结果（SFT：model.adapters 的最后一个）接着训练；false：在其上新建"
    ),
    "optimizer steps; -1: by num_train_epochs": "优化步数；-1：由 num_train_epochs 决定",
    "optimizer steps between two looks at the dev split": "每隔多少优化步在开发集上评估",
    "optimizer steps between two checkpoints of the training": "每隔多少优化步保存检查点",
    "checkpoints that are kept": "保留的检查点个数",
    "AdamW, AdamW with moments in 8 bits, or Adafactor, which hardly has any": (
        "AdamW、8 位动量的 AdamW，或几乎不占显存的 Adafactor"
    ),
    "LoRA+: B's learning rate over A's (Hayou et al. 2024): 16, say": "LoRA+：B 与 A 的学习率之比，例如 16",
    "examples side by side in one row instead of padded to the longest": "把多个样本拼在一行，而不是补齐到最长",
    "attention of packed rows; auto: varlen, torch's own; flash_attention_2 needs flash-attn": (
        "拼接行的注意力实现；auto：torch 自带的 varlen；flash_attention_2 需要 flash-attn"
    ),
    "tokens of one packed row; more is faster and takes memory, results stay": (
        "每个拼接行的词元数；越大越快、越占显存，结果不变"
    ),
    "tokens of an optimizer step, in place of a number of examples; needs packing": (
        "每个优化步的词元数，代替样本数；需要 packing"
    ),
    "compile the decoder layers; auto: on a GPU, packed, if the run is long enough to gain": (
        "编译解码层；auto：在 GPU 上、拼接时且训练够长才编译"
    ),
    "compute activations again in the backward pass; auto: as little as fits the GPU's memory": (
        "反向时重算激活值；auto：在显存允许范围内尽量少"
    ),
    "module names; query_key_value stands for q/k/v_proj on models that split them": (
        "模块名；拆开 q/k/v 的模型里，query_key_value 代表这三者"
    ),
    "scale by alpha / sqrt(rank) (Kalajdzievski 2023)": "按 alpha / sqrt(rank) 缩放",
    "train the weights' norms besides (Liu et al. 2024)": "同时训练权重的范数（DoRA）",
    "pissa: start from the weights' largest singular values (Meng et al. 2024)": "pissa：从权重最大的奇异值开始",
    "p_tuning: trained keys and values before each layer's own": "p_tuning：每层之前可训练的键值个数",
    "p_tuning: make them by a small network": "p_tuning：由一个小网络生成前缀",
    "freeze: this many last layers are trained; negative: first layers": "freeze：训练最后几层；负数表示最前几层",
    "freeze: what is trained of a layer": "freeze：训练每层的哪一部分",
    "noise on embeddings (Jain et al. 2023): 5, say": "嵌入上的噪声（NEFTune），例如 5",
    "the model that it starts from": "从哪个模型开始训练",
    "of rankings of more than two": "两个以上回答的排序用哪种损失",
    "by how much a better answer should score higher": "更好的回答应高出多少分",
    "weight of the term that holds scores around 0": "使分数保持在 0 附近的项的权重",
    "function: module:name or file.py:name; classifier: folder or hub id; http: the address": (
        "function：module:name 或 file.py:name；classifier：文件夹或 hub 名称；http：地址"
    ),
    "hub commit of a classifier": "分类器在 hub 上的提交",
    "answers of one call, forward pass or request": "每次调用、前向或请求的回答数",
    "seconds that a request may take": "单个请求的最长秒数",
    "of a request that failed, after 1, 2, 4, … seconds": "请求失败后的重试次数，间隔 1、2、4……秒",
    "held-out pair accuracy of a reward model below which it is refused": (
        "奖励模型在留出偏好对上的准确率下限，低于则拒绝"
    ),
    "rollout batches": "采样批次数",
    "prompts of one rollout batch": "每个采样批次的提示数",
    "responses of one optimizer step": "每个优化步的回答数",
    "parts in which a minibatch is computed": "一个小批次分几份计算",
    "passes over each rollout batch": "每个采样批次训练几遍",
    "GAE lambda": "GAE 的 lambda",
    "weight of the entropy bonus": "熵奖励的权重",
    "weight of the per-token KL penalty; the start value if adaptive": "逐词元 KL 惩罚的权重；自适应时为初值",
    "nats a response; empty: kl_coef stays fixed": "每个回答的目标 KL（nat）；留空：kl_coef 固定",
    "of the penalty at each token; Schulman 2020": "逐词元惩罚所用的估计式",
    "responses over which the adaptive coefficient settles": "自适应系数经过多少个回答稳定下来",
    "nats a response at which a runaway run is stopped": "每个回答的 KL 超过此值（nat）时停止失控的训练",
    "taken off the score of a response cut at max_new_tokens": "回答被 max_new_tokens 截断时扣的分",
    "scores less their running mean, divided by their running spread": "分数减去滑动均值，再除以滑动标准差",
    "scores are clipped to ± this, after score_norm": "score_norm 之后把分数截到 ± 此值",
    "scale the tokens' rewards to variance 1 in each batch": "每个批次内把逐词元奖励缩放到方差 1",
    "rollout batches between two looks at the dev prompts": "每隔多少采样批次在开发集提示上评估",
    "rollout batches between two checkpoints of the training": "每隔多少采样批次保存检查点",
    "optimizer steps": "优化步数",
    "rankings, labelled answers or prompts of an optimizer step": "每个优化步的排序、标注回答或提示数",
    "optimizer steps between two looks at the dev prompts": "每隔多少优化步在开发集提示上评估",
    "tokens of one packed row": "每个拼接行的词元数",
    "how much it costs to leave the SFT model": "偏离 SFT 模型的代价",
    "ipo: Azar et al. 2023": "ipo：Azar 等，2023",
    "share of pairs taken to be the wrong way round": "假定标反的偏好对的比例",
    "answers to each prompt of a step": "每步对每个提示生成的回答数",
    "weight of the KL divergence to SFT: GRPO's in the loss, RLOO's reward": (
        "对 SFT 的 KL 散度的权重：GRPO 加在损失里，RLOO 加在奖励里"
    ),
    "clip range of the ratio": "概率比的截断范围",
    "optimizer steps on the same answers": "同一批回答上的优化步数",
    "parts in which a step is computed": "一步分几份计算",
    "how tokens are averaged": "词元如何取平均",
    "whose spread divides advantages": "优势除以谁的标准差",
    "of the ranking loss, beside the best answer's own": "排序损失相对最佳回答损失的权重",
    "weight of the KL penalty on the reward by which the best is chosen": "挑选最佳回答时奖励里 KL 惩罚的权重",
    "test rows that are answered and scored": "参与回答和打分的测试行数",
    "of the sampled answers whose reward and KL are measured": "测量奖励与 KL 时采样的温度",
    "worst value that is accepted (a ceiling where less is better)": "可接受的最差值（越小越好的指标则为上限）",
    "may be worse than the champion by this much": "最多可比 champion 差多少",
    "must be better than the champion by more than this": "必须比 champion 好多少以上",
    "of the bootstrap intervals, two-sided": "自助法区间的置信度（双侧）",
    "held-out pairs that the reward model gets right": "奖励模型在留出偏好对上的正确率下限",
    "nats an answer from the SFT model; empty: none": "每个回答与 SFT 模型的 KL 上限（nat）；留空：不限",
    "share of an answer's token pairs seen before": "回答中重复词元对的比例上限",
    "file with a word or phrase a line": "每行一个词或短语的文件",
    "share of the answers that may hold such a word": "允许含有这类词的回答比例",
    "median seconds of one answer alone; empty: none": "单独一个回答的中位秒数上限；留空：不限",
    "let models through whose code was never committed": "放行代码从未提交过的模型",
    "a person says yes before the alias champion moves": "移动 champion 别名前需人工同意",
    "seconds that a deployment's run waits for that person": "部署的任务等待人工的秒数",
    "gets a JSON message when a flow ends; GLMFLOW_WEBHOOK_URL comes before it": (
        "流程结束时接收 JSON 消息；GLMFLOW_WEBHOOK_URL 优先"
    ),
    # of the export
    "the whole model, or what was trained alone, to be put on the same base": ("整个模型，或只导出训练出的部分"),
    "authors: names and files as ChatGLM's authors publish them; cpm-… is always theirs": (
        "authors：按 ChatGLM 原作者发布的名称和文件；cpm-… 总是如此"
    ),
    "of the export: bitsandbytes' nf4, or the authors' (cpm-…)": (
        "导出的量化：bitsandbytes 的 nf4，或原作者的（cpm-…）"
    ),
    "owner/name on the hub of what becomes the champion; empty: none": (
        "成为 champion 的模型上传到 hub 上的 owner/name；留空：不上传"
    ),
    "a model that is new on the hub is seen by its owner alone": "新建的 hub 模型只有所有者可见",
    "one a GPU; without a GPU, on the CPU": "每块 GPU 一个进程；没有 GPU 时用 CPU",
    "who holds the weights, gradients and moments of method full in SFT and reward model: each process all of "
    "them (ddp), or its share (fsdp: FSDP2; deepspeed_zero3: DeepSpeed's ZeRO stage 3, needs deepspeed). Other "
    "methods, and policies, always take ddp": (
        "SFT 与奖励模型做全参数训练时，权重、梯度和动量由谁保存：每个进程都保存全部（ddp），或只保存一"
        "份（fsdp，即 FSDP2；deepspeed_zero3，即 DeepSpeed 的 ZeRO 第三阶段，需安装 deepspeed）；其他方法和策略总是 ddp"
    ),
    "rankings; empty only where a run ends with SFT": "排序数据；只有到 SFT 为止的运行才可为空",
    "prompts of the policy; empty as above": "策略的提示；可为空的情形同上",
    "what stands for <NAME> and so on in datasets that have such marks: {NAME: 小智}": (
        "数据集中 <NAME> 等占位符所代表的内容：{NAME: 小智}"
    ),
    "packed Glm layers under a LoRA without dropout in fewer, cheaper steps, the last one only where the loss looks": (
        "打包且 LoRA 无 dropout 时，用更少更省的步骤计算 Glm 层，最后一层只算损失用到的位置"
    ),
    "packed answers of a ranking share the computation of their prompt": "打包时，同一排序的各回答共用一次提示的计算",
}
