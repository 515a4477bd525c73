using System.Text.Json.Nodes;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Bench.Real;

/// <summary>
/// The sizes of a model of MiniCPM-V-2_6's form; vision tower and decoder of the real one unless
/// others are said.
/// </summary>
internal sealed record ModelSizes
{
    public int Hidden { get; init; } = 3584;

    public int Layers { get; init; } = 28;

    public int Inter { get; init; } = 18944;

    public int Heads { get; init; } = 28;

    public int Kv { get; init; } = 4;

    public int Vocab { get; init; } = 151666;

    public int VHidden { get; init; } = 1152;

    public int VInter { get; init; } = 4304;

    public int VLayers { get; init; } = 27;

    public int VHeads { get; init; } = 16;

    public static ModelSizes Full { get; } = new();

    /// <summary>A small decoder of 24 layers, with a vision tower that hardly counts.</summary>
    public static ModelSizes Small { get; } = new()
    {
        Hidden = 1024,
        Layers = 24,
        Inter = 3584,
        Heads = 8,
        Kv = 2,
        VHidden = 144,
        VInter = 288,
        VLayers = 3,
        VHeads = 2,
    };

    /// <summary>For rehearsals without a GPU.</summary>
    public static ModelSizes Tiny { get; } = new()
    {
        Hidden = 256,
        Layers = 2,
        Inter = 512,
        Heads = 2,
        Kv = 1,
        Vocab = 1000,
        VHidden = 144,
        VInter = 288,
        VLayers = 2,
        VHeads = 2,
    };

    /// <summary>
    /// Writes the model with random bf16 weights, in the layout of Hugging Face: the small files of
    /// a folder, with these sizes in config.json. Weights come from one random buffer, each tensor
    /// from another place of it: a full-size model is made as fast as the disk takes it.
    /// </summary>
    public ModelSpec Write(string from, string to)
    {
        ModelSpec spec = Describe(from, to);
        WriteWeights(spec, to);
        return spec;
    }

    /// <summary>Writes what stands beside the weights alone.</summary>
    public ModelSpec Describe(string from, string to)
    {
        Directory.CreateDirectory(to);
        foreach (string file in Directory.EnumerateFiles(from))
            if (!file.EndsWith(".safetensors", StringComparison.Ordinal))
                File.Copy(file, Path.Combine(to, Path.GetFileName(file)), overwrite: true);
        string path = Path.Combine(to, "config.json");
        JsonNode config = JsonNode.Parse(File.ReadAllText(path))!;
        config["hidden_size"] = Hidden;
        config["num_hidden_layers"] = Layers;
        config["max_window_layers"] = Layers;
        config["intermediate_size"] = Inter;
        config["num_attention_heads"] = Heads;
        config["num_key_value_heads"] = Kv;
        config["vocab_size"] = Vocab;
        JsonNode vision = config["vision_config"]!;
        vision["hidden_size"] = VHidden;
        vision["intermediate_size"] = VInter;
        vision["num_hidden_layers"] = VLayers;
        vision["num_attention_heads"] = VHeads;
        File.WriteAllText(path, config.ToJsonString());
        return ModelSpec.Read(to);
    }

    /// <summary>Random bf16 weights of a model, biases 0, vectors 1.</summary>
    public static void WriteWeights(ModelSpec spec, string to)
    {
        byte[] random = Random();
        int tensor = 0;
        CheckpointWriter.Write(to, [.. spec.Parameters.All.Select(p => new TensorToSave(
            p.Name, DType.BF16, p.Shape, Values(p, random, tensor++)))]);
    }

    private static Action<Stream> Values(ModelParameter parameter, byte[] random, int tensor)
    {
        long bytes = 2 * parameter.Shape.Count;
        if (parameter.Name.EndsWith("bias", StringComparison.Ordinal))
            return stream => stream.Write(new byte[bytes]);
        if (parameter.Shape.Rank == 1)
            return stream => stream.Write(Ones((int)parameter.Shape.Count));
        return stream =>
        {
            int begin = (int)(tensor * 7919L * 2 % (random.Length / 2)) & ~1;
            for (long done = 0; done < bytes; begin = 0)
            {
                int count = (int)Math.Min(bytes - done, random.Length - begin);
                stream.Write(random, begin, count);
                done += count;
            }
        };
    }

    private static byte[] Ones(int count)
    {
        var bytes = new byte[2 * count];
        for (int i = 0; i < count; i++) (bytes[2 * i], bytes[(2 * i) + 1]) = (0x80, 0x3F);
        return bytes;
    }

    // Normal of deviation 0.02, as models start.
    private static byte[] Random()
    {
        const int Block = 1 << 16, Blocks = 256;
        var bytes = new byte[2 * Block * Blocks];
        Parallel.For(0, Blocks, block =>
        {
            var random = new Random(block);
            for (int i = 0; i < Block; i++)
            {
                double normal = Math.Sqrt(-2 * Math.Log(1 - random.NextDouble()))
                    * Math.Cos(2 * Math.PI * random.NextDouble());
                uint bits = BitConverter.SingleToUInt32Bits((float)(0.02 * normal));
                int at = 2 * ((block * Block) + i);
                (bytes[at], bytes[at + 1]) = ((byte)(bits >> 16), (byte)(bits >> 24));
            }
        });
        return bytes;
    }
}
