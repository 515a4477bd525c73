using System.Globalization;
using System.Text.RegularExpressions;

namespace MiniCpmNative.Engine.Config;

// The named choices of a training configuration; a value is written as its name in snake_case.

public enum DeviceChoice { Auto, Cpu, Cuda }

public enum BadRows { Error, Skip }

/// <summary>Which answers of a row are learned; a turn's own "loss" goes before it.</summary>
public enum TrainOn { All, Last }

/// <summary>
/// How the boxes of a row's "objects" are written: as ms-swift does for this family, or with the
/// model's own tokens.
/// </summary>
public enum BoxFormat { Text, Tokens }

public enum SamplingStrategy { Random, Sequential }

/// <summary>When something is done during training.</summary>
public enum When { No, Steps, Epoch }

public enum LrSchedule
{
    Linear,
    Cosine,
    CosineWithRestarts,

    /// <summary>Cosine down to a lowest rate.</summary>
    CosineWithMinLr,
    Polynomial,
    Constant,
    ConstantWithWarmup,
    InverseSqrt,

    /// <summary>DeepSpeed's WarmupLR: warm-up by logarithm, then constant.</summary>
    WarmupLr,
}

/// <summary>
/// Parameters that weight decay applies to. Hf: what the Hugging Face Trainer decays (not
/// nn.LayerNorm, nor names with bias, layernorm or rmsnorm). All: everything that is trained, as
/// under DeepSpeed.
/// </summary>
public enum DecayScope { Hf, All }

/// <summary>
/// What the summed cross-entropy of a step is divided by. Tokens: the supervised tokens of the
/// whole accumulated batch. MicroBatchMean: each micro-batch by its own, then averaged, as
/// officially.
/// </summary>
public enum LossNormalization { Tokens, MicroBatchMean }

/// <summary>
/// The optimizer, under Hugging Face's names; pairs are the same here. AdamwTorch, AdamwTorchFused:
/// AdamW with moments in F32. AdamwBf16 keeps them in BF16, rounded at random, which halves their
/// memory. The others are bitsandbytes': moments of 8 bits; paged in the machine's memory; Lion has
/// one moment, Sgd none, Adafactor a number for each row and column.
/// </summary>
public enum OptimizerKind
{
    AdamwTorch,
    AdamwTorchFused,
    AdamwBf16,
    Adamw8bit,
    AdamwBnb8bit,
    PagedAdamw8bit,
    PagedAdamw32bit,
    PagedAdamw,
    Lion32bit,
    Lion,
    Lion8bit,
    PagedLion32bit,
    PagedLion8bit,
    Sgd,
    Adafactor,
}

/// <summary>
/// What a layer computes again in backward instead of keeping it, each with what stands before it:
/// the outputs of its norms; gate and up, which leaves nothing of the MLP but its input; everything
/// but the layer's input. (SwiGLU's output is never kept.) Auto: on a GPU as little as fits into
/// its memory, else nothing.
/// </summary>
public enum Recompute { Auto, Nothing, Norms, Mlp, Block }

/// <summary>Which frozen weights lie in the machine's memory: none, the embeddings that are no
/// head, whose rows are read over the bus, or the layers too, which pass through two
/// buffers.</summary>
public enum StreamedWeights { False, Embeddings, True }

/// <summary>The table of 4-bit values.</summary>
public enum QuantType { Nf4, Fp4 }

public enum ComputeType { Float32, Float16, Bfloat16 }

/// <summary>Which biases are trained with adapters; True is PEFT's lora_bias: none of the model's,
/// and one of each lora_B.</summary>
public enum LoraBias { None, All, LoraOnly, True }

public enum WarmupCurve { Log, Linear }

public enum ReportTo { Tensorboard, All, None }

/// <summary>A count of steps, or below 1 a share of all steps.</summary>
public readonly record struct Interval(double Value)
{
    /// <summary>Steps: the value itself, or ceil(share * maxSteps), at least 1.</summary>
    public int Steps(int maxSteps) =>
        Value >= 1 ? (int)Value : Math.Max(1, (int)Math.Ceiling(maxSteps * Value));
}

/// <summary>Device memory as it was written: so many bytes, or up to 1 a share of it.</summary>
public sealed record MemoryLimit(string Text, double Value)
{
    public long Bytes(long memory) => (long)(Value <= 1 ? Value * memory : Value);

    /// <summary>Reads "24GiB", "24 GB", "500MiB", "0.5" or "50%"; null for anything else.</summary>
    public static MemoryLimit? Parse(string text)
    {
        string number = text.TrimEnd([.. "GMTKBgmtkib% "]);
        double factor = text[number.Length..].Trim().ToLowerInvariant() switch
        {
            "tib" => 1L << 40,
            "gib" => 1L << 30,
            "mib" => 1L << 20,
            "tb" => 1e12,
            "gb" => 1e9,
            "mb" => 1e6,
            "%" => 0.01,
            "" => 1,
            _ => double.NaN,
        };
        // Bytes below a mebibyte are a unit forgotten.
        return double.TryParse(number, NumberStyles.Float, CultureInfo.InvariantCulture,
            out double value) && value * factor is (> 0 and <= 1) or >= 1 << 20
            ? new MemoryLimit(text, value * factor) : null;
    }
}

/// <summary>
/// Parameters of single schedules (lr_scheduler_kwargs); what is not given has the default that the
/// schedule has in transformers or DeepSpeed.
/// </summary>
public sealed record ScheduleOptions
{
    [Key("", "cosine, cosine_with_min_lr: half waves times two (0.5); cosine_with_restarts: waves "
        + "(1)", Max = 1e6)]
    public double? NumCycles { get; init; }

    [Key("", "cosine_with_min_lr: the lowest rate", Max = 1e6)]
    public double? MinLr { get; init; }

    [Key("", "cosine_with_min_lr: the lowest rate as a share of learning_rate", Max = 1)]
    public double? MinLrRate { get; init; }

    [Key("", "polynomial: exponent", Max = 1e3)]
    public double Power { get; init; } = 1;

    [Key("", "polynomial: rate at the end", Max = 1e6)]
    public double LrEnd { get; init; } = 1e-7;

    [Key("", "inverse_sqrt: steps; the warm-up's, or 10000 without", Min = 1)]
    public int? Timescale { get; init; }

    [Key("", "warmup_lr: rate of the first step", Max = 1e6)]
    public double WarmupMinLr { get; init; }

    [Key("", "warmup_lr: log or linear")]
    public WarmupCurve WarmupType { get; init; }
}

/// <summary>The checkpoint to go on from; no path means the newest one in output_dir.</summary>
public sealed record ResumePoint(string? Path);

/// <summary>
/// Which modules get an adapter, as PEFT decides it: a regular expression that matches the whole
/// module name, or a list of names of which one is the module's or ends it after a dot.
/// </summary>
public sealed class TargetModules
{
    private readonly Regex? _pattern;

    /// <exception cref="InputException">The text is no regular expression.</exception>
    public TargetModules(string pattern)
    {
        Pattern = pattern;
        _pattern = PythonRegex.FullMatch(pattern);
    }

    public TargetModules(IReadOnlyList<string> suffixes) => Suffixes = suffixes;

    /// <summary>The regular expression, or null when suffixes decide.</summary>
    public string? Pattern { get; }

    /// <summary>Every linear layer but the head, as PEFT 0.21 takes this word.</summary>
    public bool IsAllLinear =>
        string.Equals(Pattern, "all-linear", StringComparison.OrdinalIgnoreCase);

    /// <summary>Whether both say the same, or neither is there.</summary>
    public static bool Same(TargetModules? one, TargetModules? other) => (one, other) switch
    {
        (null, null) => true,
        ({ } a, { } b) => a.Pattern == b.Pattern && a.Suffixes.SequenceEqual(b.Suffixes),
        _ => false,
    };

    public IReadOnlyList<string> Suffixes { get; } = [];

    /// <exception cref="InputException">The regular expression takes too long on this
    /// name.</exception>
    public bool Matches(string module)
    {
        try
        {
            if (_pattern is not null) return _pattern.IsMatch(module);
        }
        catch (RegexMatchTimeoutException failure)
        {
            throw new InputException(
                $"the pattern \"{Pattern}\" takes too long to match \"{module}\"", failure);
        }

        foreach (string suffix in Suffixes)
            if (module == suffix || module.EndsWith("." + suffix, StringComparison.Ordinal))
                return true;
        return false;
    }

    public override string ToString() => Pattern is { } pattern
        ? Messages.Quote(pattern) : $"[{string.Join(", ", Suffixes)}]";
}
