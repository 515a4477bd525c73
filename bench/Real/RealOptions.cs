using MiniCpmNative.Engine.Config;

namespace MiniCpmNative.Bench.Real;

/// <summary>What `bench real` is asked for.</summary>
internal sealed class RealOptions
{
    public const string Usage = """
        bench real [--name value ...]: training steps of a full-size model with random weights, the
        time of one step by kernel, and with --peer the same by PyTorch, on the same machine.

          --cases NAME,...    qkv qkv-ckpt all all-b4-ckpt long pictures small qkv-8k qlora qlora-7g
                              qlora-8k acc4 acc4-streamed streamed qlora-streamed official full
                              full-offload
                              (all of them; the last two need 120 GB of the machine's memory)
          --profile NAME,...  cases whose step is shown by kernel: all, none, names (qkv,all)
          --steps N           timed steps of each case, after 3 others (10)
          --seconds S         begins no case and no peer after so many seconds (none)
          --peer PYTHON       runs bench/peers with this interpreter, which has torch, transformers
                              and peft
          --peers NAME,...    base lean compiled attention (all of them)
          --folder DIR        where models and rows are made, and left (./bench-real)
          --base DIR          config.json and tokenizer of the model (a small one that comes along)
          --sizes NAME        full, or tiny: a rehearsal
          --hidden --layers --inter --heads --kv --vocab --vhidden --vinter --vlayers --vheads N
                              other sizes of the full model
          --recompute NAME    what cases without gradient_checkpointing recompute (auto)
          --tokens N          tokens of a row (2048; long has 8 times as many)
          --picture N         side of the pictures (1344)
          --device NAME       cuda, cpu, or emulated: the GPU that the tests have (cuda)
        """;

    private readonly Dictionary<string, string> _given = [];

    public RealOptions(string[] args)
    {
        string[] known =
        [
            "cases", "profile", "steps", "seconds", "peer", "peers", "folder", "base", "sizes",
            "hidden", "layers", "inter", "heads", "kv", "vocab", "vhidden", "vinter", "vlayers",
            "vheads", "recompute", "tokens", "picture", "device",
        ];
        for (int i = 0; i < args.Length; i += 2)
        {
            string name = args[i].StartsWith("--", StringComparison.Ordinal) ? args[i][2..] : "";
            if (!known.Contains(name) || i + 1 == args.Length)
                throw new ArgumentException(
                    $"unexpected {args[i]}, expected --name value with one of "
                    + string.Join(" ", known));
            _given[name] = args[i + 1];
        }

        IsTiny = Choice("sizes", "full", "full", "tiny") == "tiny";
        Device = Choice("device", "cuda", "cuda", "cpu", "emulated");
        ModelSizes start = IsTiny ? ModelSizes.Tiny : ModelSizes.Full;
        Sizes = start with
        {
            Hidden = Number("hidden", start.Hidden),
            Layers = Number("layers", start.Layers),
            Inter = Number("inter", start.Inter),
            Heads = Number("heads", start.Heads),
            Kv = Number("kv", start.Kv),
            Vocab = Number("vocab", start.Vocab),
            VHidden = Number("vhidden", start.VHidden),
            VInter = Number("vinter", start.VInter),
            VLayers = Number("vlayers", start.VLayers),
            VHeads = Number("vheads", start.VHeads),
        };
        int tokens = Number("tokens", IsTiny ? 128 : 2048);
        Cases =
        [
            .. Chosen("cases", "all", [.. RealCase.Table.Select(c => c.Name)]).Select(name =>
            {
                RealCase one = RealCase.Table.Single(c => c.Name == name);
                return one with
                {
                    Tokens = one.Tokens / 2048 * tokens,
                    Rank = IsTiny ? 4 : one.Rank,
                };
            }),
        ];
        Profiled = Chosen("profile", "qkv,all", [.. RealCase.Table.Select(c => c.Name)]);
        Peers = Peer is null ? []
            : Chosen("peers", "all", ["base", "lean", "compiled", "attention"]);
    }

    public bool IsTiny { get; }

    public string Device { get; }

    public ModelSizes Sizes { get; }

    public RealCase[] Cases { get; }

    public string[] Profiled { get; }

    public string[] Peers { get; }

    public string? Peer => _given.GetValueOrDefault("peer");

    public Recompute Recompute =>
        Enum.TryParse(_given.GetValueOrDefault("recompute", "auto"), true, out Recompute kind)
            ? kind : throw new ArgumentException(
                "--recompute must be auto, nothing, norms, mlp or block");

    public int Steps => Number("steps", 10);

    public int PictureSide => Number("picture", IsTiny ? 448 : RealRows.PictureSide);

    public double Seconds => Number("seconds", int.MaxValue);

    public string Folder => Path.GetFullPath(_given.GetValueOrDefault("folder", "bench-real"));

    public string Base =>
        _given.GetValueOrDefault("base", Path.Combine(AppContext.BaseDirectory, "base"));

    private string[] Chosen(string name, string otherwise, string[] all)
    {
        string given = _given.GetValueOrDefault(name, otherwise);
        if (given is "all" or "none") return given == "all" ? all : [];
        string[] chosen = given.Split(',', StringSplitOptions.RemoveEmptyEntries);
        return chosen.Except(all).FirstOrDefault() is not { } wrong ? chosen
            : throw new ArgumentException(
                $"--{name} has {wrong}, expected all, none, or some of {string.Join(',', all)}");
    }

    private string Choice(string name, string otherwise, params string[] all) =>
        _given.GetValueOrDefault(name, otherwise) is var given && all.Contains(given) ? given
            : throw new ArgumentException(
                $"--{name} is {given}, expected one of {string.Join(", ", all)}");

    private int Number(string name, int otherwise) =>
        !_given.TryGetValue(name, out string? given) ? otherwise
            : int.TryParse(given, out int number) && number > 0 ? number
            : throw new ArgumentException($"--{name} is {given}, expected a whole number above 0");
}
