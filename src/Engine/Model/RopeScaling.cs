using System.Collections.Immutable;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// What is done to rotary frequencies and angles ("longrope"), by config.json's rope_scaling or, as
/// newer transformers write it, rope_parameters.
/// </summary>
/// <param name="Short">Divisors of the frequencies, HeadDim / 2 of them, or none.</param>
/// <param name="Long">Those of a batch with a sequence of more than ShortPositions tokens; none
/// where they are the same.</param>
/// <param name="ShortPositions">original_max_position_embeddings.</param>
/// <param name="Amplitude">Factor of cos and sin (attention_factor).</param>
public sealed record RopeScaling(
    ImmutableArray<double> Short, ImmutableArray<double> Long, int ShortPositions,
    double Amplitude)
{
    public static RopeScaling None { get; } = new([], [], int.MaxValue, 1);

    /// <summary>Whether a batch whose longest sequence is so long has the long divisors.</summary>
    public bool IsLong(int positions) => !Long.IsEmpty && positions > ShortPositions;

    /// <exception cref="InputException">
    /// It is of a kind that is not supported, or a value is missing or impossible.
    /// </exception>
    public static RopeScaling Read(ModelConfig config, int headDim, int maxPositions)
    {
        foreach (string key in (string[])["rope_scaling", "rope_parameters"])
        {
            if (config.Json.Find(key) is not { } scaling
                || (scaling.Find("rope_type") ?? scaling.Find("type")) is not { } type
                || type.Text() == "default")
                continue;
            if (type.Text() != "longrope")
                throw type.Error($"is {Messages.Quote(type.Text())}, which is not supported for"
                    + $" {config.ModelName}; expected \"default\", \"longrope\" or no {key}");
            return LongRope(config, scaling, headDim / 2, maxPositions);
        }

        return None;
    }

    // As transformers computes it: a number of positions beside rope_scaling, not in it, also
    // decides the factor. Where none is written, max_position_embeddings is it.
    private static RopeScaling LongRope(
        ModelConfig config, JsonValue scaling, int count, int maxPositions)
    {
        const string positions = "original_max_position_embeddings";
        JsonValue? beside = config.Json.Find(positions);
        int original = (beside ?? scaling.Find(positions))?.Int(2)
            ?? Math.Max(2, maxPositions);
        double factor = (beside is null ? scaling.Find("factor") : null)?.Number(1e-6, 1e6)
            ?? (double)maxPositions / original;
        double amplitude = scaling.Find("attention_factor")?.Number(1e-6, 1e6)
            ?? (factor <= 1 ? 1 : Math.Sqrt(1 + (Math.Log(factor) / Math.Log(original))));
        ImmutableArray<double> near = Divisors(scaling["short_factor"], count),
            far = Divisors(scaling["long_factor"], count);
        return new RopeScaling(
            near, far.SequenceEqual(near) ? [] : far, original, amplitude);
    }

    private static ImmutableArray<double> Divisors(JsonValue list, int count)
    {
        ImmutableArray<double> values =
            [.. list.Items().Take(count + 1).Select(v => v.Number(1e-6, 1e6))];
        return values.Length == count
            ? values : throw list.Expected($"{count} numbers, half of head_dim");
    }
}
