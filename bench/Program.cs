using MiniCpmNative.Bench;
using MiniCpmNative.Bench.Real;

switch (args)
{
    case ["tokenizer", .. var rest]:
        TokenizerBench.Run(rest);
        return 0;
    case ["attention", .. var rest]:
        AttentionBench.Run(rest);
        return 0;
    case ["gemm", .. var rest]:
        GemmBench.Run(rest);
        return 0;
    case ["generate", _, ..] and [_, .. var rest]:
        return GenerateBench.Run(rest);
    case ["kernels", .. var rest]:
        return KernelBench.Run(rest);
    case ["ops", .. var rest]:
        OpBench.Run(rest);
        return 0;
    case ["pictures", .. var rest]:
        return PictureBench.Run(rest);
    case ["real", .. var rest]:
        return RealBench.Run(rest);
    case ["rows", .. var rest]:
        return RowBench.Run(rest);
    case ["step", .. var rest] when rest.Contains("--v46"):
        NativeStepBench.Run(rest);
        return 0;
    case ["step", .. var rest]:
        StepBench.Run(rest);
        return 0;
    default:
        Console.Error.WriteLine(
            "bench: expected a benchmark: attention, gemm, generate MODEL, kernels, ops, pictures, "
            + "real, rows, step, tokenizer");
        return 2;
}
