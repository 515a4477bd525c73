using System.Reflection;
using System.Text.RegularExpressions;

namespace MiniCpmNative.Kernels.Cuda;

/// <summary>
/// Numbers that kernels.cu and its launches share. They stand here alone: the compiler gets each as
/// a macro, LoraRanks as LORA_RANKS, a <see cref="DType"/> as DTYPE_BF16, a
/// <see cref="KernelFault"/> as FAULT_ROPE_POSITIONS. What a kernel cannot change without changing
/// its own code it asserts.
/// </summary>
internal static partial class KernelConstants
{
    /// <summary>Elements that a thread casts or fills: 16 bytes of the narrow types.</summary>
    public const int Cast = 8;

    /// <summary>Rows that a product with a weight in fewer bits unpacks it for as it goes; for more
    /// it is unpacked whole.</summary>
    public const int FewRows = 8;

    /// <summary>Adapters of one input that the LoRA kernels compute together.</summary>
    public const int LoraAdapters = 3;

    /// <summary>Threads of a block of the LoRA kernels, and ranks that it has sums for.</summary>
    public const int LoraThreads = 128, LoraRanks = 64;

    /// <summary>Rows of a block of lora_down, and columns that it takes at a time.</summary>
    public const int LoraDownRows = 128, LoraDownCols = 64;

    /// <summary>The tile of dx that a block of lora_gradient_x has.</summary>
    public const int LoraXRows = 64, LoraXCols = 128;

    /// <summary>Columns of a block of lora_gradient_a, and rows that it takes at a time.</summary>
    public const int LoraACols = 128, LoraARows = 64;

    /// <summary>Threads of a row of logits, which is as long as a vocabulary.</summary>
    public const int LogitsThreads = 512;

    /// <summary>Queries, or keys, of a row of the list of attention's tiles.</summary>
    public const int AttentionTileRows = 128;

    /// <summary>Of attention's kernels for any head dimension: queries of a block and keys at a
    /// time forward, and queries or keys of a block backward.</summary>
    public const int AttentionAnyRows = 16, AttentionAnyKeys = 32, AttentionAnyBackwardRows = 8;

    /// <summary>Of attention of one query: heads of a block that share a key head, and keys at a
    /// time.</summary>
    public const int AttentionDecodeHeads = 8, AttentionDecodeKeys = 64;

    /// <summary>Largest head dimension of the kernels.</summary>
    public const int AttentionMostCols = 256;

    /// <summary>Elements of 8-bit moments that share a scale: those of a warp.</summary>
    public const int UpdateBlock = Updates.DynamicMap.Block;

    /// <summary>Inputs of a causal convolution, and tokens of a block of its kernels.</summary>
    public const int ConvTaps = 4, ConvTokens = 32;

    /// <summary>Places of a tile of the experts' products, and columns of their result.</summary>
    public const int ExpertTileRows = 64, ExpertTileCols = 128;

    /// <summary>Columns of values of a block of the delta rule that goes along a sequence, and the
    /// largest heads of keys.</summary>
    public const int DeltaSlice = 16, DeltaMostCols = 128;

    /// <summary>-DNAME=value for each.</summary>
    public static string[] Macros { get; } =
    [
        .. typeof(KernelConstants).GetFields(BindingFlags.Static | BindingFlags.Public)
            .Where(f => f.IsLiteral).Select(f => Macro(f.Name, (int)f.GetRawConstantValue()!)),
        .. Enum.GetValues<DType>().Select(t => $"-DDTYPE_{t}={(int)t}"),
        .. Enum.GetValues<KernelFault>().Select(f => Macro("Fault" + f, (int)f)),
    ];

    private static string Macro(string name, int value) =>
        $"-D{Word().Replace(name, "_").ToUpperInvariant()}={value}";

    // The place before each capital but the first.
    [GeneratedRegex("(?<=.)(?=[A-Z])")]
    private static partial Regex Word();
}
