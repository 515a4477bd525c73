using MiniCpmNative.GpuEmulator.Alu;
using MiniCpmNative.GpuEmulator.Ptx;
using unsafe Handler = delegate*<MiniCpmNative.GpuEmulator.Machine.Warp,
    MiniCpmNative.GpuEmulator.Machine.Instruction, void>;

namespace MiniCpmNative.GpuEmulator.Machine;

internal sealed unsafe partial class Assembler
{
    private bool BuildCompare(Instruction i, PtxInstruction p, Opcode op)
    {
        string type = op.Last();
        bool ftz = op.Has("ftz");
        string comparison = TakeComparison(op);
        i.Mode = op.Any("and", "or", "xor") switch
        {
            "and" => Predicates.And,
            "or" => Predicates.Or,
            "xor" => Predicates.Xor,
            _ => Predicates.None,
        };
        Operands(p, i.Mode == Predicates.None ? 3 : 4);
        if (p.Operands[0].Kind == OperandKind.Pair)
        {
            i.D = Predicate(p.Operands[0].Elements[0], out _);
            i.D2 = Predicate(p.Operands[0].Elements[1], out _);
        }
        else i.D = Predicate(p.Operands[0], out _);
        i.A = Row(p.Operands[1], Width(type), type[0] == 'f');
        i.B = Row(p.Operands[2], Width(type), type[0] == 'f');
        if (i.Mode != Predicates.None) i.C = Predicate(p.Operands[3], out i.FlipC);
        i.Run = (type, ftz) switch
        {
            ("f32", false) => CompareFloat<Plain>(comparison),
            ("f32", true) => CompareFloat<Flushed>(comparison),
            ("f64", false) => CompareOf<double>(comparison),
            ("u32" or "b32", false) => CompareOf<uint>(comparison),
            ("s32", false) => CompareOf<int>(comparison),
            ("u64" or "b64", false) => CompareOf<ulong>(comparison),
            ("s64", false) => CompareOf<long>(comparison),
            ("u16" or "b16", false) => Compare16<ushort>(comparison),
            ("s16", false) => Compare16<short>(comparison),
            _ => throw op.Unknown(type),
        };
        return true;
    }

    private static string TakeComparison(Opcode op)
    {
        string comparison = op.Any("eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs",
            "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan");
        return comparison switch
        {
            "" => throw new PtxException("the comparison is missing"),
            "lo" => "lt",
            "ls" => "le",
            "hi" => "gt",
            "hs" => "ge",
            _ => comparison,
        };
    }

    private bool BuildCompareWord(Instruction i, PtxInstruction p, Opcode op)
    {
        string type = op.Last(), result = op.Last();
        string comparison = TakeComparison(op);
        Operands(p, 3);
        i.D = Result(p.Operands[0], 4);
        i.A = Row(p.Operands[1], Width(type), type[0] == 'f');
        i.B = Row(p.Operands[2], Width(type), type[0] == 'f');
        i.Mode2 = result == "f32" ? 1 : 0;
        i.Run = (type, comparison) switch
        {
            ("f32", "eq") => &Predicates.SetWord<Eq<float>, float>,
            ("f32", "lt") => &Predicates.SetWord<Lt<float>, float>,
            ("f32", "gt") => &Predicates.SetWord<Gt<float>, float>,
            ("f32", "neu") => &Predicates.SetWord<Unordered<Ne<float>, float>, float>,
            ("s32", "eq") => &Predicates.SetWord<Eq<int>, int>,
            ("s32", "ne") => &Predicates.SetWord<Ne<int>, int>,
            ("s32", "lt") => &Predicates.SetWord<Lt<int>, int>,
            ("s32", "gt") => &Predicates.SetWord<Gt<int>, int>,
            _ => throw op.Unknown($"{comparison}.{type}"),
        };
        return true;
    }

    private interface IInputs
    {
        static abstract Handler Set<TOp>() where TOp : IBinary<float>;
    }

    private readonly struct Plain : IInputs
    {
        public static Handler Set<TOp>() where TOp : IBinary<float> => &Predicates.Set<TOp, float>;
    }

    private readonly struct Flushed : IInputs
    {
        public static Handler Set<TOp>() where TOp
            : IBinary<float> => &Predicates.Set<FtzInputs<TOp>, float>;
    }

    private static Handler CompareFloat<TInputs>(string comparison) where TInputs
        : IInputs => comparison switch
        {
            "eq" => TInputs.Set<Eq<float>>(),
            "ne" => TInputs.Set<Ne<float>>(),
            "lt" => TInputs.Set<Lt<float>>(),
            "le" => TInputs.Set<Le<float>>(),
            "gt" => TInputs.Set<Gt<float>>(),
            "ge" => TInputs.Set<Ge<float>>(),
            "equ" => TInputs.Set<Unordered<Eq<float>, float>>(),
            "neu" => TInputs.Set<Unordered<Ne<float>, float>>(),
            "ltu" => TInputs.Set<Unordered<Lt<float>, float>>(),
            "leu" => TInputs.Set<Unordered<Le<float>, float>>(),
            "gtu" => TInputs.Set<Unordered<Gt<float>, float>>(),
            "geu" => TInputs.Set<Unordered<Ge<float>, float>>(),
            "num" => TInputs.Set<IsNumber<float>>(),
            _ => TInputs.Set<IsNaN<float>>(),
        };

    private static Handler CompareOf<T>(string comparison) where T : unmanaged => comparison switch
    {
        "eq" => &Predicates.Set<Eq<T>, T>,
        "ne" => &Predicates.Set<Ne<T>, T>,
        "lt" => &Predicates.Set<Lt<T>, T>,
        "le" => &Predicates.Set<Le<T>, T>,
        "gt" => &Predicates.Set<Gt<T>, T>,
        "ge" => &Predicates.Set<Ge<T>, T>,
        "equ" => &Predicates.Set<Unordered<Eq<T>, T>, T>,
        "neu" => &Predicates.Set<Unordered<Ne<T>, T>, T>,
        "ltu" => &Predicates.Set<Unordered<Lt<T>, T>, T>,
        "leu" => &Predicates.Set<Unordered<Le<T>, T>, T>,
        "gtu" => &Predicates.Set<Unordered<Gt<T>, T>, T>,
        "geu" => &Predicates.Set<Unordered<Ge<T>, T>, T>,
        "num" => &Predicates.Set<IsNumber<T>, T>,
        _ => &Predicates.Set<IsNaN<T>, T>,
    };

    private static Handler Compare16<T>(string comparison)
        where T : unmanaged, System.Numerics.INumber<T> => comparison switch
        {
            "eq" => &Predicates.Set16<Eq<T>, T>,
            "ne" => &Predicates.Set16<Ne<T>, T>,
            "lt" => &Predicates.Set16<Lt<T>, T>,
            "le" => &Predicates.Set16<Le<T>, T>,
            "gt" => &Predicates.Set16<Gt<T>, T>,
            "ge" => &Predicates.Set16<Ge<T>, T>,
            _ => throw new PtxException(
                $"comparison .{comparison} of 16-bit integers is not known"),
        };
}
