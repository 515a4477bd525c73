using MiniCpmNative.GpuEmulator;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Tests;

/// <summary>The mistakes of <see cref="PlantedFaultTests"/>.</summary>
internal static class Plants
{
    public static Plant[] All { get; } =
    [
        // 1: storage types
        new("the lower half of a word for the upper", "load_vector", "words[i] & 0xffff0000u",
            "words[i] << 16", "add") { Size = 64, With = [6] },

        // 4: sums
        new("the last row of a part is left out", "sum_rows", "r < last", "r < last - 1", "linear"),
        new("the first part is left out", "sum_parts", "int p = 0", "int p = 1", "linear"),
        new("half of the bias", "fill_rows", "narrow(b[c])", "narrow(b[c / 2])", "patch_embed")
        {
            Size = 16,
        },
        Plant.Fault(Check.OutOfBounds, "one column too many", "sum_rows", "c >= cols", "c > cols",
            "linear"),
        Plant.Fault(Check.GlobalRace, "every part writes the first", "sum_rows",
            "part[(u64)blockIdx.y * cols + c]", "part[c]", "patch_embed") with { Size = 1023 },

        // 6: element-wise
        Plant.Fault(Check.OutOfBounds, "the tail is read as a whole vector", "add_forward",
            "i + VECTOR <= count", "i < count", "add"),
        new("half of the tail is skipped", "add_forward", "j < VECTOR && i + j < count",
            "j < VECTOR / 2 && i + j < count", "add"),
        new("the scale is left out", "scale_rows", "p[j] *= scale", "p[j] *= 1", "add") { Size = 64 },
    ];
}
