namespace MiniCpmNative.Engine.Model;

/// <summary>
/// The audio encoder of MiniCPM-o: Whisper's, with a projection to OutputWidth, the decoder's.
/// </summary>
/// <param name="Positions">Rows of its position table: half of the frames of a clip, at
/// most.</param>
/// <param name="PoolStep">Frames, halved, whose mean is one feature.</param>
/// <param name="ChunkFrames">Frames, halved, of a chunk that sees those up to itself; 0 where all
/// are seen.</param>
/// <param name="SplitsPlaces">Whether each second has a place of its own in the text.</param>
public sealed record AudioSpec(
    int Bands, int Width, int Inner, int Layers, int Heads, int Positions, int OutputWidth,
    int PoolStep, int ChunkFrames, bool SplitsPlaces)
{
    /// <summary>torch.nn.LayerNorm's default.</summary>
    public const float LayerNormEpsilon = 1e-5f;

    // Frames of log-mel features in a second, and what they are behind the convolutions.
    private const int FramesOfASecond = 100, HalvedOfASecond = FramesOfASecond / 2;

    /// <summary>Frames behind the second convolution.</summary>
    public static int Halved(int frames) => ((frames - 1) / 2) + 1;

    /// <summary>Features of a clip of so many frames.</summary>
    public int Tokens(int frames) => Halved(frames) / PoolStep;

    /// <summary>Features of a place in the text, where each second has one; else all.</summary>
    public int TokensOfAPlace => SplitsPlaces ? Tokens(FramesOfASecond) : int.MaxValue;

    /// <summary>Reads what config.json says.</summary>
    /// <param name="config">The configuration.</param>
    /// <param name="poolStep">audio_pool_step where it says nothing.</param>
    /// <param name="splitsPlaces">chunk_input where it says nothing.</param>
    /// <exception cref="InputException">There is no audio encoder, or a number is
    /// wrong.</exception>
    public static AudioSpec Read(ModelConfig config, int poolStep, bool splitsPlaces)
    {
        JsonValue json = config.Json;
        if (json.Find("init_audio") is { } init && !init.Bool())
            throw init.Error("is false: the model was saved without its audio encoder; take one "
                + "that has it, or leave init_audio out");
        JsonValue audio = json["audio_config"];
        int width = ModelConfig.Size(audio, "d_model", ModelConfig.MaxWidth);
        int heads = ModelConfig.Size(audio, "encoder_attention_heads", 1 << 12);
        if (width % heads != 0)
            throw audio["d_model"].Expected($"a multiple of encoder_attention_heads ({heads})");
        int inner = ModelConfig.Size(audio, "encoder_ffn_dim", 1 << 20);
        // The official projection is made for Whisper's ratio.
        if (inner / 4 != width)
            throw audio["encoder_ffn_dim"].Expected($"4 times d_model ({width})");
        ModelConfig.RequireText(audio, "activation_function", "gelu");
        int pool = ModelConfig.Size(json, "audio_pool_step", 1 << 10, poolStep);
        int positions = ModelConfig.Size(audio, "max_source_positions", 1 << 16, 1500);
        if (positions % pool != 0)
            throw audio["max_source_positions"].Expected($"a multiple of audio_pool_step ({pool})");
        if (pool > HalvedOfASecond)
            throw json["audio_pool_step"].Expected($"at most {HalvedOfASecond}, a second");
        double seconds = json.Find("audio_chunk_length")?.Number(-1, 30) ?? 1;
        return new AudioSpec(
            ModelConfig.Size(audio, "num_mel_bins", 1 << 10, 80), width, inner,
            ModelConfig.Size(audio, "encoder_layers", ModelConfig.MaxLayers), heads, positions,
            ModelConfig.Size(json, "hidden_size", ModelConfig.MaxWidth), pool,
            seconds > 0 ? Math.Max(1, (int)(seconds * HalvedOfASecond)) : 0,
            config.Flag("chunk_input", splitsPlaces));
    }
}
