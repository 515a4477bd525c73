using System.Text.Encodings.Web;
using System.Text.Json;

namespace MiniCpmNative.Engine.Weights;

/// <summary>
/// Saves the weights of a whole model as transformers' save_pretrained does: one model.safetensors,
/// or shards of at most 5 GB, model-00001-of-00002.safetensors and so on, with
/// model.safetensors.index.json. The index is written last,
/// so it never names a shard that is not whole.
/// </summary>
public static class CheckpointWriter
{
    public const long DefaultShardBytes = 5_000_000_000;

    private static readonly JsonSerializerOptions s_json = new()
    {
        WriteIndented = true,
        NewLine = "\n",
        Encoder = JavaScriptEncoder.UnsafeRelaxedJsonEscaping,
    };

    /// <summary>
    /// Writes the tensors, in shards that follow their order, and removes older weight files.
    /// </summary>
    /// <returns>The names of the files written.</returns>
    /// <exception cref="RunException">A file cannot be written.</exception>
    public static IReadOnlyList<string> Write(
        string directory, IReadOnlyList<TensorToSave> tensors,
        long maxShardBytes = DefaultShardBytes)
    {
        var shards = Split(tensors, maxShardBytes);
        List<string> written = [];
        for (int i = 0; i < shards.Count; i++)
        {
            string name = shards.Count == 1
                ? Checkpoint.SingleFile : $"model-{i + 1:D5}-of-{shards.Count:D5}.safetensors";
            SafetensorsWriter.Write(Path.Combine(directory, name), shards[i]);
            written.Add(name);
        }

        if (shards.Count > 1)
        {
            AtomicFile.WriteText(Path.Combine(directory, Checkpoint.IndexFile),
                Index(shards, written));
            written.Add(Checkpoint.IndexFile);
        }

        RemoveOthers(directory, written);
        return written;
    }

    /// <summary>Whether a file of a model's folder holds weights, or names those that do.</summary>
    public static bool IsWeights(string name) =>
        name is Checkpoint.SingleFile or Checkpoint.IndexFile
        || (name.StartsWith("model-", StringComparison.Ordinal)
            && name.Contains("-of-", StringComparison.Ordinal)
            && name.EndsWith(".safetensors", StringComparison.Ordinal));

    // A tensor larger than a shard gets its own.
    private static List<List<TensorToSave>> Split(IReadOnlyList<TensorToSave> tensors,
        long maxBytes)
    {
        List<List<TensorToSave>> shards = [];
        List<TensorToSave> shard = [];
        long bytes = 0;
        foreach (var tensor in tensors)
        {
            if (tensor.Bytes > maxBytes)
            {
                shards.Add([tensor]);
                continue;
            }

            if (bytes + tensor.Bytes > maxBytes)
            {
                shards.Add(shard);
                (shard, bytes) = ([], 0);
            }

            shard.Add(tensor);
            bytes += tensor.Bytes;
        }

        if (shard.Count > 0 || shards.Count == 0) shards.Add(shard);
        return shards;
    }

    private static string Index(List<List<TensorToSave>> shards, List<string> names)
    {
        var map = new SortedDictionary<string, string>(StringComparer.Ordinal);
        for (int i = 0; i < shards.Count; i++)
            foreach (var tensor in shards[i]) map.Add(tensor.Name, names[i]);
        var index = new SortedDictionary<string, object>(StringComparer.Ordinal)
        {
            ["metadata"] = new Dictionary<string, long>
            {
                ["total_size"] = shards.Sum(shard => shard.Sum(tensor => tensor.Bytes)),
            },
            ["weight_map"] = map,
        };
        return JsonSerializer.Serialize(index, s_json) + "\n";
    }

    // A stale model.safetensors would win over the new index; stale shards only waste space.
    private static void RemoveOthers(string directory, List<string> written)
    {
        foreach (string path in Directory.EnumerateFiles(directory, "model*.safetensors*"))
        {
            string name = Path.GetFileName(path);
            if (IsWeights(name) && !written.Contains(name)) Delete(path);
        }
    }

    private static void Delete(string path)
    {
        try
        {
            File.Delete(path);
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            throw new RunException($"{path}: cannot remove: {Messages.OneLine(failure.Message)}",
                failure);
        }
    }
}
