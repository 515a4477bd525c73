using System.Collections.Immutable;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Weights;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// Everything a model's own files say about its shape, so that families differ by data. Numbers
/// come from config.json, picture processing from preprocessor_config.json, stop ids from
/// generation_config.json; what a file leaves out has the default of the official classes.
/// </summary>
/// <param name="Family">The member of the family it is, which knows how it is built.</param>
/// <param name="Directory">The Hugging Face model directory it was read from.</param>
/// <param name="UseImageId">config.json's use_image_id (true when absent).</param>
/// <param name="SliceMode">config.json's slice_mode.</param>
/// <param name="ModelClass">Class and module of the model's code, as PEFT's auto_mapping names
/// them.</param>
public sealed record ModelSpec(
    Family Family,
    string Directory,
    VisionSpec Vision,
    JoinerSpec Joiner,
    DecoderSpec Decoder,
    SlicingSpec Slicing,
    bool UseImageId,
    bool SliceMode,
    ProcessorSpec Processor,
    GenerationSpec Generation,
    ModelClass ModelClass)
{
    private ParameterTable? _parameters;

    /// <summary>The audio encoder, where it runs; else what a model has of one is handed
    /// on.</summary>
    public AudioSpec? Audio { get; private init; }

    /// <summary>The joiner of a model that has a resampler.</summary>
    public ResamplerSpec Resampler
    {
        get => (ResamplerSpec)Joiner;
        init => Joiner = value;
    }

    /// <summary>
    /// All tensors and modules of the model by official name, as its modules declare them.
    /// </summary>
    public ParameterTable Parameters => _parameters ??= Describe();

    /// <summary>Reads a Hugging Face model directory.</summary>
    /// <exception cref="InputException">
    /// A file is missing or wrong, or the model is not supported.
    /// </exception>
    public static ModelSpec Read(string directory)
    {
        ModelConfig config = ModelConfig.Open(directory);
        ModelSpec spec = Families.Require(config).Read(config);
        // Described at once: sizes that make no tensor are the configuration's fault.
        _ = spec.Parameters;
        return spec;
    }

    /// <summary>The model with its audio encoder, if that is wanted (init_audio).</summary>
    /// <exception cref="InputException">It has none, or what is said of it is wrong.</exception>
    public ModelSpec Hearing(bool wanted)
    {
        if (!wanted) return this;
        var hearing = this with
        {
            Audio = Family.Audio(ModelConfig.Open(Directory)) ?? throw new InputException(
                $"init_audio: {Family.Name} has no audio encoder; leave it out"),
            _parameters = null,
        };
        _ = hearing.Parameters;
        return hearing;
    }

    /// <summary>The same where an adapter may have parts of the encoder, trained whole.</summary>
    /// <inheritdoc cref="Hearing(bool)"/>
    public ModelSpec Hearing(bool wanted, string? adapter) => Hearing(wanted
        || (adapter is not null && Path.Combine(adapter, AdapterConfig.FileName) is var file
            && File.Exists(file) && AdapterConfig.Read(file).ModulesToSave
                .Any(name => name is "apm" or "audio_projection_layer")));

    /// <summary>The model with its decoder's layers replicated, and its weights too.</summary>
    /// <param name="ranges">Which layers run; null as they are.</param>
    /// <param name="weights">The model's; null where there are none.</param>
    /// <exception cref="InputException">There are no such layers, or they cannot be
    /// copied.</exception>
    public ModelSpec Replicated(LayerRanges? ranges, Checkpoint? weights)
    {
        if (ranges is null) return this;
        if (Decoder.Delta is not null)
            throw new InputException($"layer_replication {ranges}: layers of gated delta rule are "
                + $"not replicated ({Family.Name}); leave it out");
        IReadOnlyList<int> layers = ranges.Layers;
        if (layers.Max() >= Decoder.Layers || layers.Count > ModelConfig.MaxLayers)
            throw new InputException($"layer_replication {ranges}: the decoder has "
                + $"{Decoder.Layers} layers, expected ends up to that, and at most "
                + $"{ModelConfig.MaxLayers} layers in all");
        const string list = ".layers.";
        string first = Parameters.All.First(p => p.Part == ModelPart.Decoder
            && p.Name.Contains(list, StringComparison.Ordinal)).Name;
        weights?.Replicate(
            first[..(first.IndexOf(list, StringComparison.Ordinal) + list.Length)], layers);
        return this with { Decoder = Decoder with { Layers = layers.Count }, _parameters = null };
    }

    /// <summary>How rows become tokens and patches.</summary>
    /// <exception cref="InputException">
    /// The tokenizer or the chat template cannot be used.
    /// </exception>
    public RowFormat Rows() => Family.Rows(this);

    /// <summary>How a run cuts pictures: the configuration's number, the model's sizes.</summary>
    public SlicingSpec TrainedSlicing(TrainArguments arguments) =>
        Slicing with { MaxSliceNums = SliceMode ? arguments.MaxSliceNums : 1 };

    /// <summary>
    /// Whether a run numbers pictures: the official script always does, else as the processor says.
    /// </summary>
    public bool TrainsImageId(TrainArguments arguments) =>
        Family.NumbersPictures && (arguments.OfficialCompat || Processor.UseImageId);

    private ParameterTable Describe()
    {
        var table = new ParameterTable.Builder();
        Family.Build(this, new ModuleScope(table), Recomputation.None);
        return table.Build();
    }
}

/// <summary>
/// A vision tower: patches of PatchSize^2 pixels, position table of PositionsPerSide^2 rows,
/// pre-norm layers with GELU.
/// </summary>
/// <param name="Layers">Layers that exist: the last is left out under
/// drop_vision_last_layer.</param>
/// <param name="DropsLastLayer">config.json's drop_vision_last_layer.</param>
public sealed record VisionSpec(
    int HiddenSize, int IntermediateSize, int Layers, int Heads, int Channels, int PatchSize,
    int PositionsPerSide, float LayerNormEpsilon, bool DropsLastLayer)
{
    public PatchLayout Layout { get; init; } = new GridLayout();

    /// <summary>
    /// The layer behind which four neighbouring patches become one (V-4_6); null where none do.
    /// </summary>
    public int? MergesAfter { get; init; }

    /// <summary>Whether the model has what merges them, be it used or not.</summary>
    public bool HasMerger { get; init; }

    public int HeadDim => HiddenSize / Heads;

    /// <summary>Numbers in a patch, in (channel, y, x) order.</summary>
    public int PatchLength => Channels * PatchSize * PatchSize;
}

/// <summary>What turns vision features into rows of the decoder's width.</summary>
public abstract record JoinerSpec;

/// <summary>
/// Squares of 2 x 2 neighbours become one feature of the decoder's width, HiddenSize.
/// </summary>
/// <param name="Halved">Whether the vision tower has merged patches already.</param>
public sealed record MergerSpec(int HiddenSize, int VisionSize, bool Halved) : JoinerSpec
{
    // Fixed in the official code.
    public float LayerNormEpsilon => 1e-6f;

    /// <summary>Patches along each side of what becomes one feature.</summary>
    public int Merges => Halved ? 4 : 2;
}

/// <summary>
/// Cross-attention of learned queries on the patches; HiddenSize is the decoder's.
/// </summary>
/// <param name="QueryPositions">Whether queries have positions too, from a stored table (version
/// 2.0).</param>
/// <param name="CallsOutProj">See <see cref="Family.CallsOutProj"/>.</param>
public sealed record ResamplerSpec(
    int HiddenSize, int VisionSize, int Queries, bool QueryPositions = false,
    bool CallsOutProj = true) : JoinerSpec
{
    // Fixed in the official code: heads of 128, LayerNorm of 1e-6.
    public int Heads => HiddenSize / 128;

    public int HeadDim => HiddenSize / Heads;

    public float LayerNormEpsilon => 1e-6f;
}

/// <summary>
/// The decoder: pre-norm attention with grouped queries and rotary positions, SwiGLU.
/// </summary>
/// <param name="QkvBias">Whether the query, key and value projections have biases (Qwen2).</param>
/// <param name="TiedHead">lm_head is embed_tokens; no tensor of its own is stored.</param>
/// <param name="MaxPositions">max_position_embeddings.</param>
/// <param name="QkNorm">Whether queries and keys are normalised per head (Qwen3).</param>
/// <param name="EmbeddingScale">Factor of token embeddings (MiniCPM's scale_emb).</param>
/// <param name="ResidualScale">Factor of what a sublayer adds (MiniCPM: scale_depth /
/// sqrt(layers)).</param>
/// <param name="OutputScale">Factor of the last norm's output before the head (MiniCPM:
/// dim_model_base / hidden_size).</param>
/// <param name="FinalNormDecays">Whether weight decay applies to the last norm, by the Hugging Face
/// Trainer's rule: it takes Llama's and MiniCPM's norms for LayerNorms, Qwen's not.</param>
public sealed record DecoderSpec(
    int VocabSize, int HiddenSize, int IntermediateSize, int Layers, int Heads, int KvHeads,
    int HeadDim, float RmsNormEpsilon, bool QkvBias, bool TiedHead, double RopeTheta,
    RopeScaling RopeScaling, int MaxPositions, bool QkNorm = false,
    double EmbeddingScale = 1, double ResidualScale = 1, double OutputScale = 1,
    bool FinalNormDecays = true)
{
    /// <summary>The layers of gated delta rule between those of attention (V-4_6), if
    /// any.</summary>
    public DeltaSpec? Delta { get; init; }

    /// <summary>
    /// The experts of every layer (V-4_7), if there are such; IntermediateSize is then that of the
    /// one that all tokens go to.
    /// </summary>
    public ExpertsSpec? Experts { get; init; }

    /// <summary>
    /// How many of a head's columns, the first ones, are turned by its position; null for all.
    /// </summary>
    public int? RotatedColumns { get; init; }

    /// <summary>
    /// How many frequencies are the text's, the rows' and the columns' where tokens have places on
    /// canvases (mrope_section); else empty.
    /// </summary>
    public ImmutableArray<int> RopeSections { get; init; } = [];

    /// <summary>
    /// Whether norms are multiplied by 1 + weight, and weight decay passes them over.
    /// </summary>
    public bool ZeroCentredNorms { get; init; }

    /// <summary>The kind of the layers' norms.</summary>
    public NormKind Norm => new(RmsNormEpsilon, ZeroCentredNorms, Decays: !ZeroCentredNorms);

    /// <summary>Whether queries bring gates, by which what attention gives is multiplied.</summary>
    public bool OutputGate { get; init; }

    /// <summary>
    /// cos and sin [positions, columns/2] of position * theta^(-2k/columns) / divisor_k, times the
    /// amplitude; frequencies and angles are rounded to float as transformers has them.
    /// </summary>
    /// <param name="positions">Rows of the tables.</param>
    /// <param name="isLong">Whether they have the long divisors.</param>
    public (float[] Cos, float[] Sin) RopeTable(int positions, bool isLong = false)
    {
        int columns = RotatedColumns ?? HeadDim, half = columns / 2;
        ImmutableArray<double> divisors = isLong ? RopeScaling.Long : RopeScaling.Short;
        var frequencies = new float[half];
        for (int k = 0; k < half; k++)
        {
            float power = (float)Math.Pow(RopeTheta, 2f * k / columns);
            float divisor = divisors.IsEmpty ? 1 : (float)divisors[k];
            frequencies[k] = 1 / (divisor * power);
        }

        float amplitude = (float)RopeScaling.Amplitude;
        var cos = new float[checked(positions * half)];
        var sin = new float[cos.Length];
        for (int i = 0; i < cos.Length; i++)
        {
            float angle = i / half * frequencies[i % half];
            cos[i] = amplitude * (float)Math.Cos(angle);
            sin[i] = amplitude * (float)Math.Sin(angle);
        }

        return (cos, sin);
    }
}

/// <summary>A root mean square norm.</summary>
/// <param name="Centred">Whether it multiplies by 1 + weight.</param>
/// <param name="Decays">Whether weight decay applies to the weight.</param>
public sealed record NormKind(float Epsilon, bool Centred = false, bool Decays = true);

/// <summary>
/// Layers of gated delta rule: heads with a state [KeyDim, ValueDim] each, fed by a causal
/// convolution over the last Kernel tokens of each channel.
/// </summary>
/// <param name="Layers">Of each layer of the decoder, whether it is one.</param>
public sealed record DeltaSpec(
    int KeyHeads, int ValueHeads, int KeyDim, int ValueDim, int Kernel,
    ImmutableArray<bool> Layers)
{
    /// <summary>Channels of queries, keys and values together.</summary>
    public int Channels => (2 * KeyHeads * KeyDim) + (ValueHeads * ValueDim);
}

/// <summary>Count feed-forwards of Inner columns, of which each token goes to Chosen.</summary>
public sealed record ExpertsSpec(int Count, int Chosen, int Inner);

/// <summary>
/// The shipped image processor: its own slicing, normalisation and placeholder tokens.
/// </summary>
/// <param name="UseImageId">
/// Writes the image id on every picture; when the file is there and lacks the key,
/// false, as its class.
/// </param>
public sealed record ProcessorSpec(
    SlicingSpec Slicing, bool SliceMode, bool UseImageId, ImmutableArray<double> Mean,
    ImmutableArray<double> Std, PlaceholderTokens Tokens);

/// <summary>Token ids that begin and end a generated text.</summary>
public sealed record GenerationSpec(int? BosTokenId, ImmutableArray<int> EosTokenIds,
    int? PadTokenId);
