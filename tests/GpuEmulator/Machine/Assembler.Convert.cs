using System.Numerics;
using MiniCpmNative.GpuEmulator.Alu;
using MiniCpmNative.GpuEmulator.Ptx;
using unsafe Handler = delegate*<MiniCpmNative.GpuEmulator.Machine.Warp,
    MiniCpmNative.GpuEmulator.Machine.Instruction, void>;

namespace MiniCpmNative.GpuEmulator.Machine;

internal sealed unsafe partial class Assembler
{
    private bool BuildConvert(Instruction i, PtxInstruction p, Opcode op)
    {
        string from = op.Last(), to = op.Last();
        bool ftz = op.Has("ftz"), saturate = op.Has("sat"), relu = op.Has("relu");
        string rounding = op.Any("rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi");
        if (to is "bf16x2" or "f16x2")
        {
            Operands(p, 3);
            i.D = Result(p.Operands[0], 4);
            i.A = Row(p.Operands[1], 4, true);
            i.B = Row(p.Operands[2], 4, true);
            if (rounding != "rn" || from != "f32")
                throw new PtxException("only cvt.rn.*x2.f32 is known");
            i.Run = (to == "bf16x2", relu) switch
            {
                (true, false) => &Maps.Binary<PackBrain, uint>,
                (true, true) => &Maps.Scalar2<PackTwo<ReluFirst<FloatToBrain>>, uint, float, float>,
                (false, false) => &Maps.Scalar2<PackTwo<FloatToHalf>, uint, float, float>,
                (false, true) => &Maps.Scalar2<PackTwo<ReluFirst<FloatToHalf>>, uint, float, float>,
            };
            return true;
        }
        Operands(p, 2);
        i.DWidth = Math.Max(Width(to), p.Operands[0].Register?.Width ?? 4);
        i.AWidth = Math.Max(Width(from), p.Operands[1].Register?.Width ?? 4);
        i.D = Result(p.Operands[0], i.DWidth);
        i.A = Row(p.Operands[1], i.AWidth, from[0] == 'f');
        if (relu) throw new PtxException("cvt.relu of one value is not known");
        bool fromFloat = from[0] == 'f' || from == "bf16", toFloat = to[0] == 'f' || to == "bf16";
        i.Run = (fromFloat, toFloat) switch
        {
            (false, false) => ResizeTo(to, from, saturate, i),
            (false, true) => FloatFrom(to, from, rounding, op),
            (true, false) => IntegerFrom(to, from, rounding, ftz, op),
            _ => FloatToFloat(to, from, rounding, ftz, saturate, op),
        };
        return true;
    }

    private static Handler ResizeTo(string to, string from, bool saturate, Instruction i)
    {
        if (!saturate && (i.DWidth, i.AWidth) == (8, 4) && to is ("u64" or "s64"))
        {
            if (from == "u32") return &Moves.WidenUnsigned;
            if (from == "s32") return &Moves.WidenSigned;
        }
        if (!saturate && (i.DWidth, i.AWidth) == (4, 8) && to is ("u32" or "s32")
            && from is ("u64" or "s64"))
            return &Moves.Narrow64;
        return to switch
        {
            "u8" => Resize<byte>(from, saturate),
            "s8" => Resize<sbyte>(from, saturate),
            "u16" => Resize<ushort>(from, saturate),
            "s16" => Resize<short>(from, saturate),
            "u32" => Resize<uint>(from, saturate),
            "s32" => Resize<int>(from, saturate),
            "u64" => Resize<ulong>(from, saturate),
            "s64" => Resize<long>(from, saturate),
            _ => throw new PtxException($"cvt to .{to} is not known"),
        };
    }

    private static Handler Resize<TD>(string from, bool saturate) where TD : unmanaged,
        IBinaryInteger<TD> => from switch
        {
            "u8" => Resize<TD, byte>(saturate),
            "s8" => Resize<TD, sbyte>(saturate),
            "u16" => Resize<TD, ushort>(saturate),
            "s16" => Resize<TD, short>(saturate),
            "u32" => Resize<TD, uint>(saturate),
            "s32" => Resize<TD, int>(saturate),
            "u64" => Resize<TD, ulong>(saturate),
            "s64" => Resize<TD, long>(saturate),
            _ => throw new PtxException($"cvt from .{from} is not known"),
        };

    private static Handler Resize<TD, TA>(bool saturate)
        where TD : unmanaged, IBinaryInteger<TD> where TA : unmanaged,
            IBinaryInteger<TA> => saturate
            ? &Maps.Scalar1<ResizeSaturated<TD, TA>, TD, TA>
            : &Maps.Scalar1<Resize<TD, TA>, TD, TA>;

    private static Handler FloatFrom(string to, string from, string rounding, Opcode op)
    {
        if (rounding != "rn")
            throw new PtxException($"cvt.{rounding} from an integer is not known");
        return to switch
        {
            "f32" => FromInt<float>(from),
            "f64" => FromInt<double>(from),
            _ => throw op.Unknown($"{to}.{from}"),
        };
    }

    private static Handler FromInt<TD>(string from) where TD : unmanaged, INumber<TD> => from switch
    {
        "u8" => &Maps.Scalar1<FromInteger<TD, byte>, TD, byte>,
        "s8" => &Maps.Scalar1<FromInteger<TD, sbyte>, TD, sbyte>,
        "u16" => &Maps.Scalar1<FromInteger<TD, ushort>, TD, ushort>,
        "s16" => &Maps.Scalar1<FromInteger<TD, short>, TD, short>,
        "u32" => &Maps.Scalar1<FromInteger<TD, uint>, TD, uint>,
        "s32" => &Maps.Scalar1<FromInteger<TD, int>, TD, int>,
        "u64" => &Maps.Scalar1<FromInteger<TD, ulong>, TD, ulong>,
        "s64" => &Maps.Scalar1<FromInteger<TD, long>, TD, long>,
        _ => throw new PtxException($"cvt from .{from} is not known"),
    };

    private static Handler IntegerFrom(string to, string from, string rounding, bool ftz,
        Opcode op) => rounding switch
        {
            "rni" => IntegerFrom<Nearest>(to, from, ftz, op),
            "rzi" => IntegerFrom<Truncate>(to, from, ftz, op),
            "rmi" => IntegerFrom<Floor>(to, from, ftz, op),
            "rpi" => IntegerFrom<Ceiling>(to, from, ftz, op),
            _ => throw new PtxException("cvt to an integer needs .rni, .rzi, .rmi or .rpi"),
        };

    // Flushing a subnormal matters to .rmi and .rpi only, where it turns -1 or 1 into 0.
    private static Handler IntegerFrom<TRound>(string to, string from, bool ftz, Opcode op)
        where TRound : IWhole => (to, from) switch
        {
            ("u8", "f32") => ToInt<TRound, byte>(ftz),
            ("s8", "f32") => ToInt<TRound, sbyte>(ftz),
            ("u16", "f32") => ToInt<TRound, ushort>(ftz),
            ("s16", "f32") => ToInt<TRound, short>(ftz),
            ("u32", "f32") => ToInt<TRound, uint>(ftz),
            ("s32", "f32") => ToInt<TRound, int>(ftz),
            ("u64", "f32") => ToInt<TRound, ulong>(ftz),
            ("s64", "f32") => ToInt<TRound, long>(ftz),
            ("u32", "f64") => &Maps.Scalar1<ToInteger<TRound, uint, double>, uint, double>,
            ("s32", "f64") => &Maps.Scalar1<ToInteger<TRound, int, double>, int, double>,
            ("u64", "f64") => &Maps.Scalar1<ToInteger<TRound, ulong, double>, ulong, double>,
            ("s64", "f64") => &Maps.Scalar1<ToInteger<TRound, long, double>, long, double>,
            _ => throw op.Unknown($"{to}.{from}"),
        };

    private static Handler ToInt<TRound, TD>(bool ftz)
        where TRound : IWhole where TD : unmanaged, IBinaryInteger<TD>, IMinMaxValue<TD> => ftz
            ? &Maps.Scalar1<FlushFirst<ToInteger<TRound, TD, float>, TD>, TD, float>
            : &Maps.Scalar1<ToInteger<TRound, TD, float>, TD, float>;

    private static Handler FloatToFloat(
        string to, string from, string rounding, bool ftz, bool saturate, Opcode op) =>
            (to, from, rounding) switch
            {
                ("f32", "f32", "rni") => Whole<Nearest>(ftz),
                ("f32", "f32", "rzi") => Whole<Truncate>(ftz),
                ("f32", "f32", "rmi") => Whole<Floor>(ftz),
                ("f32", "f32", "rpi") => Whole<Ceiling>(ftz),
                ("f32", "f32", _) when saturate => ftz
                    ? &Maps.Unary<Ftz1<Saturate>, float>
                    : &Maps.Unary<Saturate, float>,
                ("f32", "f32", _) => ftz ? &Maps.Unary<Ftz1<Copy<float>>, float>
                    : &Maps.Unary<Copy<float>, float>,
                ("f64", "f64", "rni") => &Maps.Scalar1<ToWholeD<Nearest>, double, double>,
                ("f64", "f64", "rzi") => &Maps.Scalar1<ToWholeD<Truncate>, double, double>,
                ("f64", "f64", "rmi") => &Maps.Scalar1<ToWholeD<Floor>, double, double>,
                ("f64", "f64", "rpi") => &Maps.Scalar1<ToWholeD<Ceiling>, double, double>,
                ("f32", "f64", "rn") => ftz
                    ? &Maps.Scalar1<FlushLast<DoubleToFloat, double>, float, double>
                    : &Maps.Scalar1<DoubleToFloat, float, double>,
                ("f64", "f32", "") => ftz
                    ? &Maps.Scalar1<FlushFirst<FloatToDouble, double>, double, float>
                    : &Maps.Scalar1<FloatToDouble, double, float>,
                ("f16", "f32", "rn") => &Maps.Scalar1<FloatToHalf, ushort, float>,
                ("f32", "f16", "") => &Maps.Scalar1<HalfToFloat, float, ushort>,
                ("bf16", "f32", "rn") => &Maps.Unary<RoundBrain, uint>,
                ("bf16", "f32", "rz") => &Maps.Scalar1<FloatToBrainCut, ushort, float>,
                ("f32", "bf16", "") => &Maps.Scalar1<BrainToFloat, float, ushort>,
                _ => throw op.Unknown($"{rounding} {to}.{from}"),
            };

    private static Handler Whole<TRound>(bool ftz) where TRound : IWhole => ftz
        ? &Maps.Scalar1<FlushFirst<ToWhole<TRound>, float>, float, float>
        : &Maps.Scalar1<ToWhole<TRound>, float, float>;
}
