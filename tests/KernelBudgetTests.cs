using System.Globalization;
using System.Text;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// What each kernel costs a multiprocessor, by NVIDIA's own assembler, is a committed table: a
/// change of kernels.cu that costs registers, shared memory, occupancy or wide accesses shows as a
/// changed line. CPMX_UPDATE_BUDGET=1 rewrites it.
/// </summary>
[TestFixture]
public sealed class KernelBudgetTests
{
    private static readonly DType[] s_storages = [DType.F32, DType.BF16];
    private static readonly int[] s_architectures = [80, 86, 89, 90];

    private static readonly int[] s_headDims = [64, 72, 80, 96, 128, 256];

    // Bytes of dynamic shared memory that the host asks for, at the head size of production.
    private static int Dynamic(KernelBuild b)
    {
        if (b.Kernel.StartsWith("delta_", StringComparison.Ordinal))
            return CudaDeltaRule.SharedBytes(b.Kernel, keyDim: 128, b.Storage.Size());
        if (b.Kernel == "attention_forward_any") return sizeof(float) * ((16 * 128) + (64 * 129));
        if (b.Kernel == "attention_decode") return sizeof(float) * ((8 * 128) + (8 * 128));
        if (s_adapters.Contains(b.Kernel) || s_experts.Contains(b.Kernel))
            return CudaLoraProducts.SharedBytes(b.Storage);
        if (!s_tensorCores.Contains(b.Kernel)) return 0;
        int headDim = int.Parse(b.Kernel[(b.Kernel.LastIndexOf('_') + 1)..]);
        bool small = KernelBuilds.SmallShared(b.Architecture);
        return (b.Kernel.Contains("forward")
            ? AttentionLaunch.Forward(headDim, small)
            : AttentionLaunch.Backward(headDim, small))!.Value.SharedBytes;
    }

    private static readonly string[] s_adapters =
        ["lora_down", "lora_gradient_x", "lora_gradient_a"];

    private static readonly string[] s_experts =
        ["expert_product", "expert_product_back", "expert_gradient"];

    // Tensor-core kernels: tiles come by asynchronous copies and leave by ldmatrix.
    private static readonly string[] s_tensorCores =
    [
        .. s_headDims.Select(d => $"attention_forward_{d}"),
        .. s_headDims.Select(d => $"attention_backward_{d}"),
        .. s_adapters, .. s_experts,
    ];

    // Tensor-core kernels that load their operands straight into registers.
    private static readonly string[] s_fragments =
    [
        "delta_chunks", "delta_states", "delta_output", "delta_state_gradients", "delta_gradients",
    ];

    // Kernels that move long rows, and so must move 16 bytes at a time.
    private static readonly string[] s_wide =
    [
        "norm_forward", "norm_backward", "add_forward", "scale_rows", "gelu_forward",
        "gelu_backward", "relu",
        "swiglu_forward", "swiglu_backward", "dora_columns", "dora_backward", "dora_mask", "rope",
        "heads", "cast_to_real", "cast_to_float",
        "adamw", "adamw_bf16_moments", "lion", "update_8bit",
        "lookup_rows", "weighted_gather", "sum_by_id", "gather_rows", "columns_forward",
        "columns_backward", "cache_append", "splice_forward", "splice_text_backward",
        "cross_entropy_rows", "cross_entropy_scatter",
        "gated_norm_forward", "gated_norm_backward", "sigmoid_gate", "sigmoid_gate_backward",
        "conv_forward", "conv_backward", "combine_experts", "experts_backward", "gated_add",
        "gated_add_backward",
    ];

    // The same, but only what they read, or write, is long.
    private static readonly string[] s_wideReads =
    [
        "norm_weight_parts", "gradient_norm_parts", "sum_rows", "lora_down_parts",
        "lora_gradient_a_parts", "attention_statistics", "sum_parts_to_real",
        "attention_decode", "multiply_4bit", "multiply_int8", "multiply_grouped",
    ];

    private static readonly string[] s_wideWrites =
        ["fill_real", "fill_rows", "unpack_4bit", "unpack_int8", "unpack_grouped"];

    // Kernels of small or strided work, where an access of an element is right.
    private static readonly string[] s_narrow =
    [
        "sum_parts", "gradient_norm_finish", "attention_forward_any", "attention_keys_backward",
        "attention_queries_backward", "attention_decode_merge", "adapted_norm", "attention_tiles",
        "dropout_mask",
        "gated_norm_weight_parts", "conv_state", "delta_unit_gradients",
        "unfold_forward", "unfold_backward",
        "order_by_id", "row_of_term", "splice_invert", "cross_entropy_check", "cross_entropy_sum",
        "adafactor_rows", "adafactor_column_parts", "adafactor_columns", "adafactor_means",
        "adafactor_squares", "adafactor_rate", "adafactor_change",
        "route_experts", "route_experts_backward", "sort_by_expert", "expert_tiles",
    ];

    private KernelBuild[] _builds = null!;

    private static string File => Path.Combine(ReferenceFile.Root, "..", "kernel-budget.txt");

    [OneTimeSetUp]
    public void Build()
    {
        if (KernelBuilds.Missing is { } reason)
            Assert.Ignore($"{reason}: tests/install-cuda-tools.sh unpacks it");
        _builds = [.. KernelBuilds.Make(s_storages, s_architectures)];
    }

    [Test]
    public void TheTableIsTheCommittedOne()
    {
        string table = Table(_builds);
        if (Environment.GetEnvironmentVariable("CPMX_UPDATE_BUDGET") == "1")
            System.IO.File.WriteAllText(File, table);
        string[] now = table.Split('\n'), kept = System.IO.File.ReadAllLines(File);
        if (now[0] != kept[0])
            Assert.Ignore($"the table is of other tools: \"{kept[0]}\", here \"{now[0]}\"");
        string[] gone = [.. kept.Except(now).Select(l => "- " + l)];
        string[] come = [.. now.Where(l => l.Length > 0).Except(kept).Select(l => "+ " + l)];
        string[] changes = [.. gone.Concat(come).OrderBy(l => l[2..], StringComparer.Ordinal)];
        Assert.That(changes, Is.Empty,
            "kernel-budget.txt differs (CPMX_UPDATE_BUDGET=1 rewrites it):\n  " + now[1]
            + "\n" + string.Join('\n', changes.Take(40)));
    }

    // 255 registers are all there are: where blocks are small, 8 bytes stored and 16 loaded remain.
    [Test]
    public void NothingSpillsNorLivesInLocalMemory() => None(b =>
        b.SpillStores + b.SpillLoads
            > (b is { Kernel: "attention_backward_128", Architecture: 86 or 89 } ? 24 : 0)
        || (b.SpillLoads == 0 && b.StackBytes + b.Count("LDL") + b.Count("STL") > 0),
        b => $"{b.StackBytes} bytes of stack, {b.SpillStores} stored and {b.SpillLoads} loaded by "
            + "spills");

    [Test]
    public void TensorCoreKernelsUseThemAndCopyAsynchronously() => None(
        b => s_tensorCores.Contains(b.Kernel) && b.Storage != DType.F32
            && (b.Count("HMMA") == 0 || b.Count("LDSM") == 0 || b.Count("LDGSTS") == 0),
        b => $"{b.Count("HMMA")} HMMA, {b.Count("LDSM")} LDSM, {b.Count("LDGSTS")} LDGSTS");

    [Test]
    public void FragmentKernelsUseTensorCores() => None(
        b => s_fragments.Contains(b.Kernel) && b.Storage != DType.F32 && b.Count("HMMA") == 0, _ =>
            "no HMMA");

    [Test]
    public void MemoryBoundKernelsMoveSixteenBytesAtATime() => None(
        b => (s_wide.Concat(s_wideReads).Contains(b.Kernel) && b.Count("LDG", "128") == 0)
            || (s_wide.Concat(s_wideWrites).Contains(b.Kernel) && b.Count("STG", "128") == 0),
        b => $"{b.Count("LDG", "128")} of {b.Count("LDG")} loads and {b.Count("STG", "128")} of " +
            $"{b.Count("STG")} stores are of 16 bytes");

    [Test]
    public void EveryKernelIsInOneOfTheLists()
    {
        string[] listed =
        [
            .. s_tensorCores, .. s_fragments, .. s_wide, .. s_wideReads, .. s_wideWrites,
            .. s_narrow,
        ];
        Assert.That(listed.Distinct().Order(),
            Is.EqualTo(_builds.Select(b => b.Kernel).Distinct().Order()));
    }

    [Test]
    public void EveryKernelFitsAMultiprocessor() =>
        None(b => Blocks(b) == 0, b =>
            $"{b.Threads} threads of {b.Registers} registers, {Shared(b)} bytes");

    private void None(Func<KernelBuild, bool> bad, Func<KernelBuild, string> describe) =>
        Assert.That(
        _builds.Where(bad)
            .Select(b => $"{b.Kernel} {b.Storage} sm_{b.Architecture}: {describe(b)}"),
        Is.Empty);

    private static int Shared(KernelBuild b) =>
        b.SharedBytes + Dynamic(b);

    private static int Blocks(KernelBuild b) =>
        Occupancy.Of(b.Architecture).Blocks(b.Threads, b.Registers, Shared(b));

    private static string Table(IEnumerable<KernelBuild> builds)
    {
        var text = new StringBuilder($"# {KernelBuilds.Versions()}; PTX of compute_80\n");
        text.Append(
            $"# {"kernel",-30} type sm thr reg shared dynamic stack spill+ spill- LDL STL HMMA "
                + "LDSM " +
            "LDGSTS LDG128/LDG STG128/STG blocks occupancy\n");
        foreach (KernelBuild b in builds)
        {
            int blocks = Blocks(b);
            double share = Occupancy.Of(b.Architecture).Share(b.Threads, blocks);
            text.Append(CultureInfo.InvariantCulture,
                $"{b.Kernel,-32} {b.Storage,4} {b.Architecture} {b.Threads,3} {b.Registers,3} "
                    + $"{b.SharedBytes,6} ")
                .Append(CultureInfo.InvariantCulture,
                $"{Dynamic(b),7} {b.StackBytes,5} {b.SpillStores,6} ")
                .Append(CultureInfo.InvariantCulture,
                $"{b.SpillLoads,6} {b.Count("LDL"),3} {b.Count("STL"),3} {b.Count("HMMA"),4} "
                    + $"{b.Count("LDSM"),4} ")
                .Append(CultureInfo.InvariantCulture,
                $"{b.Count("LDGSTS"),6} {Of(b, "LDG"),10} {Of(b, "STG"),10} {blocks,6} "
                    + $"{share,8:0%}\n");
        }

        return text.ToString();
    }

    private static string Of(KernelBuild b, string name) =>
        $"{b.Count(name, "128")}/{b.Count(name)}";
}
