using MiniCpmNative.GpuEmulator.Ptx;

namespace MiniCpmNative.GpuEmulator.Machine;

/// <summary>Rows of %tid, %ctaid and the like, filled when a warp starts.</summary>
internal static unsafe class SpecialRegisters
{
    public static bool IsKnown(string name) => name is "%tid.x" or "%tid.y" or "%tid.z"
        or "%ntid.x" or "%ntid.y" or "%ntid.z" or "%ctaid.x" or "%ctaid.y" or "%ctaid.z"
        or "%nctaid.x" or "%nctaid.y" or "%nctaid.z" or "%laneid" or "%warpid" or "%nwarpid"
        or "%lanemask_eq" or "%lanemask_lt" or "%lanemask_le" or "%lanemask_gt" or "%lanemask_ge"
        or "%smid" or "%nsmid" or "%gridid" or "%dynamic_smem_size" or "%total_smem_size"
        or "%cluster_ctarank" or "%cluster_nctarank" or "WARP_SZ";

    public static void Fill(Warp warp, string name, int row)
    {
        uint* r = (uint*)(warp.R + row);
        for (int lane = 0; lane < 32; lane++) r[lane] = Value(warp, name, lane);
    }

    private static uint Value(Warp warp, string name, int lane)
    {
        var block = warp.Block;
        var (sx, sy, sz) = block.Size;
        int thread = warp.Index * 32 + lane;
        return (uint)(name switch
        {
            "%tid.x" => thread % sx,
            "%tid.y" => thread / sx % sy,
            "%tid.z" => thread / (sx * sy),
            "%ntid.x" => sx,
            "%ntid.y" => sy,
            "%ntid.z" => sz,
            "%ctaid.x" => block.Place.X,
            "%ctaid.y" => block.Place.Y,
            "%ctaid.z" => block.Place.Z,
            "%nctaid.x" => block.Grid.X,
            "%nctaid.y" => block.Grid.Y,
            "%nctaid.z" => block.Grid.Z,
            "%laneid" => lane,
            "%warpid" => warp.Index,
            "%nwarpid" => block.WarpCount,
            "%lanemask_eq" => (int)(1u << lane),
            "%lanemask_lt" => (int)((1u << lane) - 1),
            "%lanemask_le" => (int)((2u << lane) - 1),
            "%lanemask_gt" => (int)~((2u << lane) - 1),
            "%lanemask_ge" => (int)~((1u << lane) - 1),
            "%smid" or "%gridid" or "%cluster_ctarank" => 0,
            "%nsmid" or "%cluster_nctarank" => 1,
            "%dynamic_smem_size" => block.DynamicShared,
            "%total_smem_size" => block.Program.StaticShared + block.DynamicShared,
            "WARP_SZ" => 32,
            _ => throw new PtxException($"special register {name} is not known"),
        });
    }
}
