using System.Text.Json;
using System.Text.Json.Nodes;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Engine.Train;

/// <summary>
/// What a run produces, in the form others read: with use_lora a PEFT adapter, else the whole model
/// in Hugging Face's layout, with the tokenizer and configuration
/// files of the model it started from.
/// </summary>
public static class ModelFiles
{
    // Anything else in a model's folder (optimizer states, pictures,
    // other weights) is not the model.
    private static readonly string[] s_copied = [".json", ".txt", ".model", ".jinja", ".py"];

    private static readonly JsonSerializerOptions s_json = new()
    {
        WriteIndented = true,
        NewLine = "\n",
        Encoder = System.Text.Encodings.Web.JavaScriptEncoder.UnsafeRelaxedJsonEscaping,
    };

    /// <summary>Writes the adapter or the model into a folder.</summary>
    /// <exception cref="RunException">A file cannot be written.</exception>
    public static void Save(string folder, TrainingModel model, TrainArguments arguments)
    {
        if (arguments.UseLora)
        {
            AdapterFile.Write(
                folder, model.Parts.Config!, model.Parts.Layout!, [.. model.Trainables.List.Select(
                    tensor => model.ToSave(tensor.Name, model.Trainables.Value(tensor.Name)))]);
            return;
        }

        string source = arguments.ModelNameOrPath!;
        using Checkpoint checkpoint = Checkpoint.Open(source);
        DType type = TrainingModel.StorageOf(arguments);
        CheckpointWriter.Write(folder, [.. model.Spec.Parameters.All.Select(expected =>
            model.Trainables.Contains(expected.Name)
                ? model.ToSave(expected.Name, model.Trainables.Value(expected.Name))
                : Frozen(checkpoint.Get(expected.Name), type))]);
        foreach (string file in Directory.EnumerateFiles(source))
        {
            string name = Path.GetFileName(file);
            if (!s_copied.Contains(Path.GetExtension(name)) || name == Checkpoint.IndexFile)
                continue;
            byte[] content = File.ReadAllBytes(file);
            if (name == "config.json") content = WithType(content, type);
            AtomicFile.Write(Path.Combine(folder, name), stream => stream.Write(content));
        }
    }

    /// <summary>Reads a checkpoint's trained values back into the model.</summary>
    /// <exception cref="InputException">The checkpoint does not fit the configuration.</exception>
    public static void Load(string folder, TrainingModel model, TrainArguments arguments)
    {
        if (arguments.UseLora)
        {
            using AdapterFile adapter = AdapterFile.Open(folder);
            model.CopyFrom(adapter);
            return;
        }

        using Checkpoint checkpoint = Checkpoint.Open(folder);
        checkpoint.MustMatch(model.Spec.Parameters, Families.Explain);
        foreach (Trainable tensor in model.Trainables.List)
            model.Trainables.Write(tensor.Name, checkpoint.Get(tensor.Name).ToFloats());
    }

    // Frozen values leave rounded to the run's type, as they took part in it.
    private static TensorToSave Frozen(StoredTensor stored, DType type)
    {
        if (stored.Type == type)
            return TensorToSave.Raw(stored.Name, type, stored.Shape, stored.Data);
        return new TensorToSave(stored.Name, type, stored.Shape, stream =>
        {
            float[] values = stored.ToFloats();
            unsafe
            {
                fixed (float* data = values)
                    TensorToSave.Floats(stored.Name, type, stored.Shape, (nint)data).Write(stream);
            }
        });
    }

    private static byte[] WithType(byte[] config, DType type)
    {
        JsonNode json = JsonNode.Parse(config)!;
        json["torch_dtype"] = type switch
        {
            DType.BF16 => "bfloat16",
            DType.F16 => "float16",
            _ => "float32",
        };
        return [.. JsonSerializer.SerializeToUtf8Bytes(json, s_json), (byte)'\n'];
    }
}
