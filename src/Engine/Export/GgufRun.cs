using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;

namespace MiniCpmNative.Engine.Export;

/// <summary>What `cpmx export gguf` was asked for.</summary>
/// <param name="Model">The model's folder.</param>
/// <param name="Adapter">Folder of an adapter to put in, or null.</param>
/// <param name="Out">The folder to make.</param>
/// <param name="Type">Name of the type of the language model's matrices.</param>
public sealed record GgufRequest(string Model, string? Adapter, string Out, string Type);

/// <summary>
/// `cpmx export gguf`: the language model as NAME-TYPE.gguf and vision tower and resampler as
/// mmproj-NAME-f16.gguf, for llama.cpp and what is built on it.
/// </summary>
public static class GgufRun
{
    public const string DefaultType = "f16";

    public static IEnumerable<string> Types => GgufType.Choices.Select(type => type.Name);

    /// <exception cref="InputException">
    /// The model is none that llama.cpp reads, or model, adapter or arguments cannot be used.
    /// </exception>
    /// <exception cref="RunException">A file cannot be written.</exception>
    public static void Run(GgufRequest request, TextWriter output)
    {
        GgufType type = GgufType.Choices.FirstOrDefault(t => t.Name == request.Type)
            ?? throw new InputException($"--type is {Messages.Quote(request.Type)}, expected one "
                + "of "
                + string.Join(", ", Types));
        using MergedWeights weights = MergedWeights.Open(request.Model, request.Adapter);
        ModelSpec spec = weights.Spec;
        if (spec.Family.Gguf is not { } names)
            throw new InputException(
                $"{request.Model}: llama.cpp reads no {spec.Family.Name}, nothing is written");
        if (GgufDelta.WhyNot(spec.Decoder) is { } obstacle)
            throw new InputException($"{request.Model}: {obstacle}, nothing is written");
        using NewFolder folder = NewFolder.Create(
            request.Out, (type.Bytes(32) * spec.Parameters.Count / 32) + (1 << 20));
        string name = spec.Family.Name;
        Say($"{name}-{type}.gguf", path => GgufDecoder.Write(path, weights, type));
        if (GgufProjector.WhyNot(spec) is { } reason)
            output.WriteLine($"pictures are left out: {reason}");
        else
            Say($"mmproj-{name}-f16.gguf", path => GgufProjector.Write(path, weights));
        if (names.Note is { } note) output.WriteLine(note);
        folder.Place();

        void Say(string file, Action<string> write)
        {
            string path = Path.Combine(folder.Path, file);
            write(path);
            output.WriteLine($"{Path.Combine(request.Out, file)}: "
                + RunPlaces.Gib(new FileInfo(path).Length));
        }
    }
}
