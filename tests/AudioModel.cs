using System.Text.Json.Nodes;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Tests;

/// <summary>
/// MiniCPM-o 4.5's reference model with the audio encoder of its reference (bfloat16 numbers),
/// whose results the official code gave in F32.
/// </summary>
internal static class AudioModel
{
    private static ReferenceFile? s_wanted;

    /// <summary>Weights, features, gradients.</summary>
    public static ReferenceFile Wanted
    {
        get
        {
            if (s_wanted is not null) return s_wanted;
            string folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;
            File.WriteAllBytes(Path.Combine(folder, "encoder.safetensors"),
                ReferenceText.Bytes("o45/audio/encoder.safetensors"));
            s_wanted = ReferenceFile.OpenAt(Path.Combine(folder, "encoder"));
            Directory.Delete(folder, recursive: true);
            return s_wanted;
        }
    }

    /// <summary>Writes it; change alters its config.json.</summary>
    public static string Write(string folder, Action<JsonObject>? change = null)
    {
        ModelSpec spec = Describe(folder, change);
        using Checkpoint rest = Checkpoint.Open(ReferenceModel.Of("o45").Spec.Directory);
        MadeModel.Write(folder, spec, name => Wanted.Has(name)
            ? Wanted.Floats(name) : rest.Get(name).ToFloats(), DType.BF16);
        return folder;
    }

    /// <summary>The same without weights.</summary>
    public static ModelSpec Describe(string folder, Action<JsonObject>? change = null)
    {
        foreach (string file in Directory.GetFiles(
            ReferenceModel.Of("o45").Spec.Directory, "*.json"))
            File.WriteAllBytes(
                Path.Combine(folder, Path.GetFileName(file)), File.ReadAllBytes(file));
        string path = Path.Combine(folder, "config.json");
        JsonObject config = JsonNode.Parse(File.ReadAllBytes(path))!.AsObject();
        config["init_audio"] = true;
        config["audio_config"] = new JsonObject
        {
            ["d_model"] = 64,
            ["encoder_layers"] = 2,
            ["encoder_attention_heads"] = 4,
            ["encoder_ffn_dim"] = 256,
            ["num_mel_bins"] = 80,
            ["max_source_positions"] = 160,
            ["activation_function"] = "gelu",
        };
        change?.Invoke(config);
        File.WriteAllText(path, config.ToJsonString());
        return ModelSpec.Read(folder).Hearing(true);
    }

    /// <summary>The reference's clips, whose features take the places of all tokens.</summary>
    public static Batch Clips(out int[] tokens)
    {
        tokens = [.. Enumerable.Range(0, 3).Select(i => Wanted.Shape($"d_features.{i}")[0])];
        var batch = new Batch();
        batch.Clear();
        batch.AddRow(new int[tokens.Sum()], []);
        float[] mel = Wanted.Floats("mel");
        int[] lengths = Wanted.Ints("mel_lengths"), shape = Wanted.Shape("mel");
        for (int i = 0, at = 0; i < lengths.Length; at += tokens[i++])
        {
            batch.AddSoundSlots([new(at, at + tokens[i])], 0);
            Span<float> clip = batch.AddClip(lengths[i], shape[1]);
            for (int t = 0; t < lengths[i]; t++)
                for (int band = 0; band < shape[1]; band++)
                    clip[(t * shape[1]) + band] = mel[(((i * shape[1]) + band) * shape[2]) + t];
        }

        return batch;
    }

    /// <summary>A WAV file of 16 bits: tones, one every tenth of a second.</summary>
    public static byte[] Wav(int samples, int seed = 1, int rate = 16000)
    {
        var random = new Random(seed);
        byte[] data = new byte[2 * samples];
        double tone = 0;
        for (int i = 0; i < samples; i++)
        {
            if (i % (rate / 10) == 0) tone = 200 + (3000 * random.NextDouble());
            BitConverter.TryWriteBytes(data.AsSpan(2 * i),
                (short)(8000 * Math.Sin(2 * Math.PI * tone * i / rate)));
        }

        using var file = new MemoryStream();
        using var writer = new BinaryWriter(file);
        writer.Write("RIFF"u8);
        writer.Write(36 + data.Length);
        writer.Write("WAVEfmt "u8);
        writer.Write(16);
        writer.Write((short)1);
        writer.Write((short)1);
        writer.Write(rate);
        writer.Write(2 * rate);
        writer.Write((short)2);
        writer.Write((short)16);
        writer.Write("data"u8);
        writer.Write(data.Length);
        writer.Write(data);
        return file.ToArray();
    }

    /// <summary>Its decoder learns through adapters, its encoder runs.</summary>
    public static TrainArguments Lora(string model, string data) => ReferenceModel.Of("o45").Lora
        with
    {
        ModelNameOrPath = model,
        DataPath = data,
        OfficialCompat = false,
        InitAudio = true,
    };
}
